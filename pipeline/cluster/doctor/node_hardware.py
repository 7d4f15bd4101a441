"""What a node has for `pipeline doctor` to judge: NVIDIA's driver, and what could carry gradients to other nodes.

A container sees in /sys what its host has, also what it may not open or has no library for.
"""

import ctypes
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline import machine

ACTIVE = "4: ACTIVE"  # kernel.org, Documentation/ABI/stable/sysfs-class-infiniband
# NCCL's own RDMA takes ports of these two, InfiniBand and RoCE. (AWS's EFA says "Unknown", and needs a plugin.)
LINK_LAYERS = ("InfiniBand", "Ethernet")
RDMA_LIBRARY, CUDA_LIBRARY = "libibverbs.so.1", "libcuda.so.1"
JPEG_LIBRARY = "libnvcuvid.so.1"  # nvJPEG opens it for the GPU's JPEG unit; containers get it with `video` only


@dataclass(frozen=True)
class Gpus:
    """What a process finds of NVIDIA's here.

    has_devices: whether files of GPUs are there. trouble: why NVML cannot be asked; all below is then unknown.
    driver: its version. newest_cuda: the newest major version that it runs. torch_cuda: which torch is built for.
    missing: libraries that cannot be loaded. capabilities: NVIDIA_DRIVER_CAPABILITIES.
    """

    has_devices: bool
    trouble: str = ""
    driver: str = ""
    newest_cuda: int = 0
    torch_cuda: str | None = None
    missing: tuple[str, ...] = ()
    capabilities: str | None = None


def gpus(dev: Path = Path("/dev")) -> Gpus:
    """By NVML, which answers with any driver, also one that torch cannot use."""
    import pynvml

    has_devices = any(dev.glob("nvidia[0-9]*"))
    try:
        pynvml.nvmlInit()
        driver, newest_cuda = pynvml.nvmlSystemGetDriverVersion(), pynvml.nvmlSystemGetCudaDriverVersion()
        pynvml.nvmlShutdown()
    except pynvml.NVMLError as e:
        return Gpus(has_devices, trouble=str(e))
    import torch

    missing = tuple(name for name in (CUDA_LIBRARY, JPEG_LIBRARY) if not _can_load(name))
    capabilities = os.environ.get("NVIDIA_DRIVER_CAPABILITIES")
    return Gpus(has_devices, "", driver, newest_cuda // 1000, torch.version.cuda, missing, capabilities)


@dataclass(frozen=True)
class Links:
    """What a node could reach others by.

    host: which machine it is on; pods may share one. rdma: Gbit/s of each active port.
    interface: Gbit/s of the fastest network card that says so; 0: none does, as in a pod with a network of its own.
    missing: what its processes lack to use the ports. is_rdma_off: whether NCCL is told to leave them.
    """

    host: str
    rdma: tuple[float, ...] = ()
    interface: float = 0.0
    missing: tuple[str, ...] = ()
    is_rdma_off: bool = False


def links(sys: Path = Path("/sys"), dev: Path = Path("/dev"), proc: Path = machine.PROC) -> Links:
    rdma = tuple(sorted(_rdma_rates(sys), reverse=True))
    missing = [RDMA_LIBRARY] if rdma and not _can_load(RDMA_LIBRARY) else []
    if rdma and not any(dev.glob("infiniband/uverbs*")):
        missing.append("/dev/infiniband/uverbs*")
    return Links(
        host=_read(proc / "sys/kernel/random/boot_id"),
        rdma=rdma,
        interface=max(_card_speeds(sys), default=0.0),
        missing=tuple(missing),
        is_rdma_off=os.environ.get("NCCL_IB_DISABLE", "0") not in ("", "0"),
    )


def _rdma_rates(sys: Path) -> Iterator[float]:
    for port in sys.glob("class/infiniband/*/ports/*"):
        if _read(port / "state") == ACTIVE and _read(port / "link_layer") in LINK_LAYERS:
            yield float(_read(port / "rate").partition(" ")[0] or 0)  # 400 Gb/sec (4X NDR)


def _card_speeds(sys: Path) -> Iterator[float]:
    """Gbit/s. What has no device below it is made by software (veth, bridges, lo), and its speed is made up."""
    for card in sys.glob("class/net/*"):
        speed = _read(card / "speed")  # Mbit/s; -1 or an error: unknown
        if speed.isdecimal() and (card / "device").exists():
            yield int(speed) / 1e3


def _can_load(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8").strip()
    except OSError:
        return ""
