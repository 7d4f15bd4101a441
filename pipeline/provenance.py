"""What made a result: the software's versions, its commit, the machine. So that a figure can be explained later."""

import platform
import shutil
import subprocess
from functools import cache
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch

import pipeline

PACKAGES = ("torch", "torchvision", "nvidia-dali", "ray", "mlflow", "omegaconf", "numpy")  # or NAME-cuda130


@cache
def software() -> dict[str, Any]:
    """{"versions": {name: version}, "git_commit": of this package, or None where there is no repository}"""
    commit = ""
    if git := shutil.which("git"):  # the image has none
        command = [git, "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    installed = {one.name.partition("-cuda")[0]: one.version for one in distributions()}
    versions = {"pipeline": pipeline.__version__, "python": platform.python_version()}
    versions |= {name: installed[name] for name in PACKAGES if name in installed}
    return {"versions": versions, "git_commit": commit or None}


def device_name(device: torch.device) -> str:
    """Of a GPU, or of this machine's processor."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_model()


def cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
