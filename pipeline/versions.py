"""What made a result: the software's versions, its commit, the machine. So that a figure can be explained later."""

import platform
import shutil
import subprocess
from functools import cache
from importlib.metadata import distributions
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pipeline

if TYPE_CHECKING:  # torch takes seconds to import, for which `doctor` would wait on every node
    import torch

PACKAGES = ("torch", "torchvision", "nvidia-dali", "ray", "mlflow", "omegaconf", "numpy", "pyarrow")


@cache
def software() -> dict[str, Any]:
    """{"versions": {name: version}, "git_commit": of this package, or None where there is no repository}"""
    commit = ""
    if git := shutil.which("git"):  # the image has none
        command = [git, "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return {"versions": versions(), "git_commit": commit or None}


def versions() -> dict[str, str]:
    """Of this package, Python, and those of PACKAGES that are installed, under these names for any CUDA."""
    installed = {"pipeline": pipeline.__version__, "python": platform.python_version()}
    for package in distributions():
        if (name := str(package.name).lower().partition("-cuda")[0]) in PACKAGES:
            installed.setdefault(name, package.version)  # the first of a name is the one that is imported
    return installed


def device_name(device: "torch.device") -> str:
    """Of a GPU, or of this machine's processor."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_model()


def cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
