"""A worker's threads stay where they are told to, and nowhere where that would do harm."""

import os
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipeline.cluster import affinity

CPU = torch.device("cpu")


def in_a_thread(function: Callable[[], Any]) -> Any:
    """Its result; what it is pinned to ends with the thread."""
    results = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    thread.join()
    return results[0]


def test_threads_started_later_stay_on_the_workers_cores() -> None:
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        pytest.skip("needs two cores")

    def second_of_two() -> tuple[list[int], set[int]]:
        pinned = affinity.pin_threads("cores", CPU, 1, 2, 1)
        return pinned, in_a_thread(lambda: os.sched_getaffinity(0))

    assert in_a_thread(second_of_two) == ([cores[1]], {cores[1]})
    assert sorted(os.sched_getaffinity(0)) == cores, "others are left alone"


@pytest.mark.parametrize(("how", "size"), [("none", 1), ("numa", 1), ("cores", 10_000)])
def test_a_cpu_worker_stays_where_it_is(how: Any, size: int) -> None:
    cores = sorted(os.sched_getaffinity(0))
    assert in_a_thread(lambda: affinity.pin_threads(how, CPU, 0, size, 1)) == cores


@pytest.mark.parametrize(
    ("nearby", "shares"),
    [
        ([set(), set()], [[0, 1], [2, 3]]),
        ([{4, 5, 6, 7}, {0, 1, 2, 3}], [[4, 5], [0, 1]]),  # the first GPU is on the second socket
        ([{4, 5, 6, 7}] * 3, [[4, 5], [6, 7], [0, 1]]),  # all on one socket, which is too small for them
    ],
)
def test_own_cores_are_next_to_the_gpu(nearby: list[set[int]], shares: list[list[int]]) -> None:
    assert affinity.share_out(range(8), nearby, 2) == shares


def test_a_gpu_workers_own_cores_are_on_its_socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each worker sees all GPUs of its node's workers, and takes what falls to its own."""
    monkeypatch.setattr(affinity, "PCI", tmp_path)
    pinned = dict[int, set[int]]()
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: pinned.get(pid, set(range(8))))
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, cores: pinned.update({pid: set(cores)}))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda i: SimpleNamespace(pci_domain_id=0, pci_bus_id=0x10 + i, pci_device_id=0),
    )
    for bus, cores in (("10", "4-7"), ("11", "0-3")):
        (tmp_path / f"0000:{bus}:00.0").mkdir()
        (tmp_path / f"0000:{bus}:00.0" / "local_cpulist").write_text(cores)
    assert affinity.pin_threads("cores", torch.device("cuda:0"), 0, 2, 4) == [4, 5, 6, 7]
    pinned.clear()
    assert affinity.pin_threads("cores", torch.device("cuda:1"), 1, 2, 4) == [0, 1, 2, 3]


def test_cores_next_to_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(affinity, "PCI", tmp_path)
    gpu = SimpleNamespace(pci_domain_id=0, pci_bus_id=0x1B, pci_device_id=0)
    assert affinity.near(gpu) == set()
    (tmp_path / "0000:1b:00.0").mkdir()
    (tmp_path / "0000:1b:00.0" / "local_cpulist").write_text("0-2,8,10-11\n")
    assert affinity.near(gpu) == {0, 1, 2, 8, 10, 11}
