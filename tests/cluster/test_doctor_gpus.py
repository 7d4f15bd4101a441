"""What `pipeline doctor` makes of GPU drivers; none of them is there."""

import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pynvml
import pytest
from commands import PIPELINE

from pipeline.cluster import ray_cluster
from pipeline.cluster.doctor import check_gpus, examine, node_hardware
from pipeline.cluster.doctor.check_results import Check
from pipeline.cluster.doctor.node_hardware import Gpus
from pipeline.cluster.ray_cluster import Answer, Node
from pipeline.config.loading import load

DIGITS = str(Path(__file__).parents[2] / "configs" / "digits.yaml")
GOOD = Gpus(has_devices=True, driver="580.95.05", newest_cuda=13, torch_cuda="13.0")
OLD = replace(GOOD, driver="535.230.02", newest_cuda=12)
CAPABILITIES = "NVIDIA_DRIVER_CAPABILITIES=compute,utility"


def fake_nvml(monkeypatch: pytest.MonkeyPatch, driver: str, cuda: int) -> None:
    for name, value in {
        "nvmlInit": None,
        "nvmlShutdown": None,
        "nvmlSystemGetDriverVersion": driver,
        "nvmlSystemGetCudaDriverVersion": cuda,
    }.items():
        monkeypatch.setattr(pynvml, name, lambda value=value: value)


def test_the_driver_is_asked_by_nvml(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "nvidia0").touch()
    fake_nvml(monkeypatch, "535.230.02", 12020)
    monkeypatch.setattr("torch.version.cuda", "13.0")
    monkeypatch.setattr(node_hardware, "_can_load", lambda name: name == "libcuda.so.1")
    monkeypatch.setenv("NVIDIA_DRIVER_CAPABILITIES", "compute,utility")
    found = node_hardware.gpus(tmp_path)
    assert found == replace(OLD, missing=("libnvcuvid.so.1",), capabilities="compute,utility")


def test_a_machine_without_nvml_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", refuse)
    (tmp_path / "nvidiactl").touch()  # there with any container that has none of the GPUs
    assert node_hardware.gpus(tmp_path) == Gpus(has_devices=False, trouble="NVML Shared Library Not Found")


@pytest.mark.parametrize(
    ("gpus", "line"),
    [
        ({"a": GOOD, "b": GOOD}, "ok  GPU driver: 580.95.05 (runs CUDA 13, torch's is 13.0) on a, b"),
        (
            {"a": replace(GOOD, torch_cuda="12.8")},
            "ok  GPU driver: 580.95.05 (runs CUDA 13, torch's is 12.8) on a",
        ),
        (
            {"a": replace(OLD, torch_cuda="12.8")},  # 12.8 on the driver of 12.2: minor versions are compatible
            "ok  GPU driver: 535.230.02 (runs CUDA 12, torch's is 12.8) on a",
        ),
        (
            {"a": GOOD, "b": OLD, "c": OLD},
            "bad GPU driver: driver 535.230.02 runs CUDA 12 at most, torch is built for CUDA 13.0 and needs driver 580 "
            "or later on b, c; install driver 580 or later there, or a torch and a DALI that are built for CUDA 12",
        ),
        (
            {"a": replace(GOOD, torch_cuda="15.1")},
            "bad GPU driver: driver 580.95.05 runs CUDA 13 at most, torch is built for CUDA 15.1 and needs a driver "
            "for CUDA 15 on a; install a driver for CUDA 15 there, or a torch and a DALI that are built for CUDA 13",
        ),
        (
            {"a": replace(GOOD, torch_cuda=None)},
            "bad GPU driver: torch is built without CUDA on a; install a torch that is built for CUDA 13",
        ),
        (
            {"a": replace(GOOD, missing=("libcuda.so.1", "libnvcuvid.so.1"))},
            "bad GPU driver: libcuda.so.1 is missing on a; set NVIDIA_DRIVER_CAPABILITIES=compute,utility,video for "
            "the container",
        ),
        (
            {"a": Gpus(has_devices=True, trouble="Driver Not Loaded")},
            "bad GPU driver: NVML does not open (Driver Not Loaded) on a; make nvidia-smi work on that host; a "
            "container needs NVIDIA's container toolkit, a GPU and NVIDIA_DRIVER_CAPABILITIES=compute,utility,video",
        ),
    ],
)
def test_the_driver_runs_the_cuda_that_torch_is_built_for(gpus: dict[str, Gpus], line: str) -> None:
    assert str(check_gpus.check_drivers(gpus)) == line


def test_different_troubles_are_told_with_their_fixes() -> None:
    check = check_gpus.check_drivers({"a": OLD, "b": replace(GOOD, torch_cuda=None)})
    assert check.text.endswith("or later on a, torch is built without CUDA on b")
    assert check.fix.startswith("install driver 580")
    assert check.fix.endswith("; install a torch that is built for CUDA 13")


def test_a_missing_jpeg_unit_is_told_and_bad_where_nodes_differ() -> None:
    assert check_gpus.check_jpeg_unit({"a": GOOD}) is None
    without = replace(GOOD, missing=("libnvcuvid.so.1",), capabilities="compute,utility")
    told = check_gpus.check_jpeg_unit({"a": without, "b": replace(without, capabilities=None)})
    assert str(told) == (
        f"ok  JPEG unit: libnvcuvid.so.1 is missing on a ({CAPABILITIES}), b: there CUDA cores decode, also where a "
        f"GPU has such a unit; to use it, set {CAPABILITIES},video"
    )
    mixed = check_gpus.check_jpeg_unit({"a": without, "b": GOOD})
    assert str(mixed) == (
        f"bad JPEG unit: libnvcuvid.so.1 is missing on a ({CAPABILITIES}): there CUDA cores decode, also where a GPU "
        "has such a unit, and pixels may differ in the last bit from those of other nodes; to use it, set "
        f"{CAPABILITIES},video on all nodes; or set data.hw_decoder_load=0"
    )


def look(
    monkeypatch: pytest.MonkeyPatch, nodes: dict[str, Node], answers: dict[str, object], *words: str
) -> list[Check]:
    cfg = load(None, ["data.train=x", "data.val=x", *words])

    def on_each_node(there: dict[str, Node], function: object, **_: object) -> dict[str, Answer]:
        assert function is node_hardware.gpus
        return {name: Answer(answers[name], 0.0, 1.0) for name in there if name in answers}

    monkeypatch.setattr(ray_cluster, "on_each_node", on_each_node)
    return examine._look_at_gpus(nodes, cfg)


def test_gpus_are_looked_at_where_workers_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray counts no GPUs where NVML does not open: then their files tell of them, and a training would take CPUs."""
    nodes = {
        "head": Node("1", "10.0.0.1", {}),
        "cpu": Node("2", "10.0.0.2", {"CPU": 8}),
        "lost": Node("3", "10.0.0.3", {"CPU": 8}),
        "gpu": Node("4", "10.0.0.4", {"CPU": 8, "GPU": 2}),
        "old": Node("5", "10.0.0.5", {"GPU": 1}),
        "silent": Node("6", "10.0.0.6", {"GPU": 1}),
    }
    none = Gpus(has_devices=False, trouble="NVML Shared Library Not Found")
    answers: dict[str, object] = {
        "head": replace(none, has_devices=True),
        "cpu": none,
        "lost": Gpus(has_devices=True, trouble="Driver/library version mismatch"),
        "gpu": GOOD,
        "old": ImportError("No module named 'pynvml'\n..."),
    }
    (check,) = look(monkeypatch, nodes, answers)
    assert check.text == (
        "NVML does not open (Driver/library version mismatch) on lost, "
        "NVML does not open (No module named 'pynvml') on old, NVML does not open (no answer in time) on silent"
    )
    assert look(monkeypatch, nodes, answers, "cluster.device=cpu") == []
    assert look(monkeypatch, {"cpu": nodes["cpu"]}, answers) == []


@pytest.mark.parametrize(
    ("words", "count"), [([], 2), (["data.decode_on_gpu=false"], 1), (["data.hw_decoder_load=0"], 1)]
)
def test_the_jpeg_unit_is_of_interest_where_it_would_decode(
    monkeypatch: pytest.MonkeyPatch, words: list[str], count: int
) -> None:
    answers: dict[str, object] = {"a": replace(GOOD, missing=("libnvcuvid.so.1",))}
    assert len(look(monkeypatch, {"a": Node("1", "10.0.0.1", {"GPU": 1})}, answers, *words)) == count


def test_this_machine_answers() -> None:
    """Whatever it has: the libraries are there, or are not."""
    assert isinstance(node_hardware.gpus(), Gpus)
    assert node_hardware._can_load("libc.so.6")
    assert not node_hardware._can_load("libcuda.so.99")


NVML = """
#include <string.h>
int nvmlInit_v2(void) { return 0; }
int nvmlInitWithFlags(unsigned flags) { return 0; }
int nvmlShutdown(void) { return 0; }
int nvmlSystemGetDriverVersion(char *v, unsigned n) { strncpy(v, "535.230.02", n); return 0; }
int nvmlSystemGetCudaDriverVersion(int *v) { *v = 12020; return 0; }
int nvmlDeviceGetCount_v2(unsigned *n) { *n = 1; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned i, void **h) { *h = &nvmlShutdown; return 0; }
int nvmlDeviceGetName(void *h, char *v, unsigned n) { strncpy(v, "NVIDIA H200", n); return 0; }
"""


@pytest.fixture
def old_driver(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a command through Ray, which counts a GPU here as it does with a real NVML of any driver."""
    if shutil.which("gcc") is None:
        pytest.skip("no C compiler here")
    library = tmp_path / "libnvidia-ml.so.1"
    command = ["gcc", "-shared", "-fPIC", "-w", "-x", "c", "-", "-o", str(library)]
    subprocess.run(command, input=NVML, text=True, check=True, timeout=60)
    env = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path)}
    settings = ["cluster.workers=1", f"run.storage={tmp_path}/runs", "mlflow.uri=sqlite:///mine.db"]

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [PIPELINE, *words, *settings]
        return subprocess.run(command, text=True, capture_output=True, check=False, timeout=150, env=env, cwd=tmp_path)

    return run


@pytest.mark.e2e
def test_a_training_on_an_old_driver_says_so_once(
    old_driver: Callable[..., subprocess.CompletedProcess[str]], digits: Path
) -> None:
    """It would fail again and again: "ProcessGroupNCCL is only supported with GPUs, no GPUs found!"."""
    done = old_driver("train", DIGITS, *(f"data.{split}={digits}/{split}" for split in ("train", "val")))
    assert done.returncode == 1, done.stdout + done.stderr
    (line,) = [line for line in done.stdout.splitlines() if "cannot use the GPU" in line]
    assert line.startswith("failed: a worker cannot start: ")
    assert line.endswith("; `pipeline doctor` says what to install, or set cluster.device=cpu")
    assert "failed" not in done.stderr, "nor is it tried again"


@pytest.mark.e2e
def test_a_machine_with_an_old_driver_is_told(old_driver: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    done = old_driver("doctor")
    assert done.returncode == 1, done.stdout + done.stderr
    (line,) = [line for line in done.stdout.splitlines() if "GPU driver" in line]
    assert line.startswith("bad GPU driver: driver 535.230.02 runs CUDA 12 at most, torch is built for CUDA 13")
    assert "install driver 580 or later there" in line
