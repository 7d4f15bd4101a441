"""Lines of `pipeline doctor` about GPUs: whether torch and DALI can use them with the driver that is there."""

from collections import defaultdict
from collections.abc import Mapping

from pipeline.cluster.doctor.check_results import Check, name_some
from pipeline.cluster.doctor.node_hardware import CUDA_LIBRARY, JPEG_LIBRARY, Gpus

# The first driver for any CUDA of a major version; later drivers run it, too.
# https://docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html, table 1
FIRST_DRIVERS = {11: 450, 12: 525, 13: 580}
CAPABILITIES = "NVIDIA_DRIVER_CAPABILITIES=compute,utility,video"
NVML_FIX = f"make nvidia-smi work on that host; a container needs NVIDIA's container toolkit, a GPU and {CAPABILITIES}"


def check_drivers(gpus: Mapping[str, Gpus]) -> Check:
    """Whether the driver of each node with GPUs runs the CUDA that torch is built for there."""
    bad, good, fixes = defaultdict[str, list[str]](list), defaultdict[str, list[str]](list), dict[str, None]()
    for name, found in gpus.items():
        if trouble := _trouble(found):
            reason, fix = trouble
            bad[reason].append(name)
            fixes[fix] = None
        else:
            good[f"{found.driver} (runs CUDA {found.newest_cuda}, torch's is {found.torch_cuda})"].append(name)
    text = name_some(f"{words} on {name_some(names)}" for words, names in (bad or good).items())
    return Check("GPU driver", not bad, text, "; ".join(fixes))


def _trouble(found: Gpus) -> tuple[str, str] | None:
    """What is wrong, and its fix."""
    if found.trouble:
        return f"NVML does not open ({found.trouble})", NVML_FIX
    has = found.newest_cuda
    if found.torch_cuda is None:
        return "torch is built without CUDA", f"install a torch that is built for CUDA {has}"
    needed = int(found.torch_cuda.partition(".")[0])
    if has < needed:
        driver = f"driver {first} or later" if (first := FIRST_DRIVERS.get(needed)) else f"a driver for CUDA {needed}"
        needs = f"torch is built for CUDA {found.torch_cuda} and needs {driver}"
        reason = f"driver {found.driver} runs CUDA {has} at most, {needs}"
        return reason, f"install {driver} there, or a torch and a DALI that are built for CUDA {has}"
    if CUDA_LIBRARY in found.missing:
        return f"{CUDA_LIBRARY} is missing", f"set {CAPABILITIES} for the container"
    return None


def check_jpeg_unit(gpus: Mapping[str, Gpus]) -> Check | None:
    """Told where a library is missing without which a GPU's JPEG unit is not used; bad where only some nodes lack it.

    DALI works without: nvImageCodec takes up its decoder for the unit only where nvJPEG can open it, and else decodes
    on CUDA cores. But the pixels of the two differ in the last bit.
    """
    nodes = defaultdict[str, list[str]](list)
    for name, found in gpus.items():
        if JPEG_LIBRARY in found.missing:
            nodes[f"NVIDIA_DRIVER_CAPABILITIES={found.capabilities}" if found.capabilities else ""].append(name)
    if not nodes:
        return None
    where = name_some(f"{name_some(names)}{given and f' ({given})'}" for given, names in nodes.items())
    text = f"{JPEG_LIBRARY} is missing on {where}: there CUDA cores decode, also where a GPU has such a unit"
    fix = f"to use it, set {CAPABILITIES}"
    if sum(map(len, nodes.values())) == len(gpus):
        return Check("JPEG unit", True, f"{text}; {fix}")
    text += ", and pixels may differ in the last bit from those of other nodes"
    return Check("JPEG unit", False, text, f"{fix} on all nodes; or set data.hw_decoder_load=0")
