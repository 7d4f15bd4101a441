"""torch's switches for GPUs: which kernels it takes, in how many bits, and whether the same ones each time.

They hold for a whole process. Nothing else here sets them.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from pipeline.config.training import TrainConfig


def set_backends(cfg: TrainConfig, device: torch.device) -> None:
    """Have this process compute as configured, from now on."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # Shapes stay the same. But the search goes by timing: another attempt may take others, which round otherwise.
    torch.backends.cudnn.benchmark = not cfg.deterministic
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = cfg.tf32
    if cfg.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it starts
    torch.use_deterministic_algorithms(cfg.deterministic)


@contextmanager
def kernels_by_shape() -> Iterator[None]:
    """Have cuDNN choose kernels by their shapes alone: no search for one that does not come again, no chance in it."""
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.deterministic
    cudnn.benchmark, cudnn.deterministic = False, True
    try:
        yield
    finally:
        cudnn.benchmark, cudnn.deterministic = before
