"""Which cores a worker's threads may use: those of its own arithmetic, of the loader, and of the collectives."""

import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

PCI = Path("/sys/bus/pci/devices")


def pin_threads(
    how: Literal["none", "numa", "cores"], device: torch.device, local_rank: int, local_size: int, num_threads: int
) -> list[int]:
    """Keep this thread, and those that it starts from now on, on cores that suit the worker.

    numa: on those next to its GPU; a CPU worker stays where it is. cores: on `num_threads` of its own, next to its GPU
    as far as there are, which other processes of the machine should leave alone; it stays where it is if the node has
    not so many for all its workers.

    Returns:
        The cores that it may use.
    """
    allowed = sorted(os.sched_getaffinity(0))
    chosen: Collection[int] = ()
    if how == "numa" and device.type == "cuda":
        chosen = near(torch.cuda.get_device_properties(device)) & set(allowed)
    elif how == "cores" and local_size * num_threads <= len(allowed):
        # Ray shows each worker the GPUs of all workers of its node.
        gpus = range(torch.cuda.device_count()) if device.type == "cuda" else range(0)
        nearby = [near(torch.cuda.get_device_properties(i)) for i in gpus] or [set()] * local_size
        chosen = share_out(allowed, nearby, num_threads)[local_rank if device.index is None else device.index]
    if chosen:
        os.sched_setaffinity(0, chosen)
    return sorted(os.sched_getaffinity(0))


def share_out(cores: Sequence[int], nearby: Sequence[Collection[int]], number: int) -> list[list[int]]:
    """So many cores for each of several workers, in their order those nearby first, as long as there are any."""
    free, shares = list(cores), list[list[int]]()
    for some in nearby:
        shares.append(sorted(free, key=lambda core: core not in some)[:number])
        free = [core for core in free if core not in shares[-1]]
    return shares


def near(gpu: Any) -> set[int]:
    """The cores next to the GPU of these properties, as the kernel knows them; none where it does not say."""
    address = f"{gpu.pci_domain_id:04x}:{gpu.pci_bus_id:02x}:{gpu.pci_device_id:02x}.0"
    file = PCI / address / "local_cpulist"
    return parse(file.read_text(encoding="utf-8")) if file.exists() else set()


def parse(cores: str) -> set[int]:
    """Of the kernel's form, such as 0-3,8,10-11."""
    ranges = [part.partition("-") for part in cores.strip().split(",") if part]
    return {core for low, _, high in ranges for core in range(int(low), int(high or low) + 1)}
