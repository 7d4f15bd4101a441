"""Small arrays on their way to the device."""

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor


def to_device(array: NDArray[Any], device: torch.device) -> Tensor:
    """A copy on the device. Nobody waits for it: a GPU fetches it from pinned memory when its stream comes to it."""
    host = torch.from_numpy(array)
    if device.type != "cuda":
        return host.to(device, copy=True)
    return host.pin_memory().to(device, non_blocking=True)
