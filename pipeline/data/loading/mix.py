"""mixup and CutMix, on the device, in whole numbers: the same bits on every device and for every share of a batch."""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.data.augment_params import MIX_ONE
from pipeline.data.loading.to_device import to_device
from pipeline.data.stream import IntArray


def mix(images: Tensor, labels: Tensor, weights: IntArray, boxes: IntArray, num_classes: int) -> tuple[Tensor, Tensor]:
    """Mix images 2i and 2i + 1 into each other.

    Args:
        images: (B, 3, S, S) uint8, channels_last, B even.
        labels: (B,) int64.
        weights: (B / 2,) of an image's own pixels, in 1 / MIX_ONE.
        boxes: (B / 2, 4) top, left, bottom, right of what comes from the partner alone, pixels.

    Returns:
        images (B, 3, S, S) uint8, channels_last, and the share of each class (B, C), float32.
    """
    device, size = images.device, images.shape[-1]
    pixels = images.permute(0, 2, 3, 1)  # as they lie in memory
    own = to_device(weights, device).repeat_interleave(2).to(torch.int32)
    top, left, bottom, right = to_device(boxes, device).repeat_interleave(2, 0).T[:, :, None]
    pixel = torch.arange(size, device=device)
    inside_y, inside_x = (pixel >= top) & (pixel < bottom), (pixel >= left) & (pixel < right)  # (B, S) each
    cut = (inside_y[:, :, None] & inside_x[:, None, :])[..., None]

    others = _partners(pixels)
    mixed = torch.where(cut, others, pixels).to(torch.int32)
    mixed -= others  # in place, as this is all there is to the cost
    mixed *= own[:, None, None, None]
    mixed += MIX_ONE // 2
    mixed >>= MIX_ONE.bit_length() - 1
    mixed += others

    # On the host: a GPU divides by multiplying with the inverse, which rounds otherwise.
    kept = 1 - (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) / size**2
    shares = (weights / MIX_ONE * kept).astype(np.float32)
    share = to_device(shares, device).repeat_interleave(2)[:, None]
    one_hot = F.one_hot(labels, num_classes).float()
    return mixed.to(torch.uint8).permute(0, 3, 1, 2), share * one_hot + (1 - share) * _partners(one_hot)


def _partners(values: Tensor) -> Tensor:
    """The other one of each pair, in its place."""
    return values.reshape(-1, 2, *values.shape[1:]).flip(1).reshape(values.shape)
