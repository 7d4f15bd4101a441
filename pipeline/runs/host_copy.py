"""A training state copied into the host's memory, from where it is written while training goes on."""

from typing import Any

import torch


def to_host(value: Any, buffers: Any) -> Any:
    """A nested state's copy in host memory, pinned where it comes from a GPU.

    torch's own DefaultStager does the same; it took twice as long here (docs/reliability.md).

    Args:
        buffers: an earlier copy whose memory is used again, or None.
    """
    copied = _to_host(value, buffers)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return copied


def _to_host(value: Any, buffers: Any) -> Any:
    if isinstance(value, torch.Tensor):
        if buffers is None or buffers.shape != value.shape:
            buffers = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
        return buffers.copy_(value.detach(), non_blocking=True)
    if isinstance(value, dict):
        return {k: _to_host(v, (buffers or {}).get(k)) for k, v in value.items()}
    if isinstance(value, list):
        return [_to_host(v, b) for v, b in zip(value, buffers or [None] * len(value), strict=True)]
    return value
