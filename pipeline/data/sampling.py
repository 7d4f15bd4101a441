"""The exact data stream: which samples form a batch, and how each one is cropped and flipped.

Everything here is a pure function of `(seed, epoch, position)`: no state, no I/O, no dependence on
the number of ranks, threads, or on where training was interrupted. A *position* is a place in one
epoch's shuffled order; `permute` maps it to a sample's row in the index.

Randomness is counter-based (Philox, Salmon et al. 2011, "Parallel Random Numbers: As Easy as
1, 2, 3"): the numbers of a position are looked up, not drawn in sequence. Each purpose has a counter
space of its own, so that a new augmentation never changes the draws of an old one.
"""

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]

FEISTEL_ROUNDS = 6
CROP_TRIES = 10  # torchvision's RandomResizedCrop.get_params


class Purpose(IntEnum):
    """Counter spaces of the draws. Numbers are part of the stream's definition: append, never change."""

    ORDER = 0
    CROP = 1
    FLIP = 2


def steps_per_epoch(num_samples: int, global_batch: int) -> int:
    """Optimizer steps of an epoch; its last partial global batch is dropped.

    Raises:
        ValueError: not one whole batch.
    """
    if num_samples < global_batch:
        raise ValueError(f"{num_samples} training images do not fill one train.global_batch={global_batch}; lower it")
    return num_samples // global_batch


def share(num_items: int, rank: int, world_size: int) -> tuple[int, int]:
    """The contiguous part [start, stop) of `num_items` that `rank` takes; sizes differ by one at most."""
    return num_items * rank // world_size, num_items * (rank + 1) // world_size


def batch_positions(step: int, num_samples: int, global_batch: int, rank: int, world_size: int) -> tuple[int, int, int]:
    """Where a rank's part of global batch `step` lies.

    Args:
        step: steps done before this one, over all epochs.

    Returns:
        (epoch, start, stop): positions [start, stop) of that epoch's order.
    """
    epoch, k = divmod(step, steps_per_epoch(num_samples, global_batch))
    start, stop = share(global_batch, rank, world_size)
    return epoch, k * global_batch + start, k * global_batch + stop


def permute(positions: IntArray, num_samples: int, seed: int, epoch: int) -> IntArray:
    """Map positions of an epoch's order to sample rows: a keyed bijection of [0, num_samples).

    A balanced Feistel network over the smallest even number of bits that holds `num_samples`, with
    cycle-walking: a value that falls outside is encrypted again until it is inside (Black & Rogaway
    2002, "Ciphers with Arbitrary Finite Domains"). The domain is less than four times `num_samples`, so
    a position takes four tries at most on average. Time and memory are proportional to `positions`.

    Args:
        positions: (B,) in [0, num_samples).

    Returns:
        (B,) rows, distinct for distinct positions.
    """
    half = np.uint64(max(1, (int(num_samples - 1).bit_length() + 1) // 2))
    keys = np.random.Philox(key=_key(seed, epoch), counter=_counter(Purpose.ORDER, 0)).random_raw(FEISTEL_ROUNDS)
    values = positions.astype(np.uint64)
    outside = np.ones(len(values), dtype=bool)
    while outside.any():
        values[outside] = _feistel(values[outside], half, keys)
        outside = values >= num_samples
    return values.astype(np.int64)


def _feistel(values: NDArray[np.uint64], half: np.uint64, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = values >> half, values & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return (left << half) | right


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele et al. 2014): every input bit reaches every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def uniforms(purpose: Purpose, seed: int, epoch: int, start: int, stop: int, num_draws: int) -> FloatArray:
    """The draws of positions [start, stop) for one purpose.

    Returns:
        (stop - start, num_draws), uniform in [0, 1); row i depends on position start + i alone.
    """
    blocks = -(-num_draws // 4)  # a Philox counter yields four numbers
    bits = np.random.Philox(key=_key(seed, epoch), counter=_counter(purpose, start * blocks))
    raw = bits.random_raw((stop - start) * blocks * 4).reshape(stop - start, blocks * 4)[:, :num_draws]
    return (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _key(seed: int, epoch: int) -> NDArray[np.uint64]:
    return np.array([seed, epoch], dtype=np.uint64)


def _counter(purpose: Purpose, block: int) -> NDArray[np.uint64]:
    return np.array([block, 0, 0, int(purpose)], dtype=np.uint64)


def random_resized_crops(
    heights: IntArray,
    widths: IntArray,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    draws: FloatArray,
) -> tuple[IntArray, IntArray]:
    """Crops by the law of torchvision's RandomResizedCrop.

    Ten tries of (area, log aspect ratio), the first that fits wins; if none fits, the central crop
    whose aspect ratio is the nearest allowed one.

    Args:
        heights, widths: (B,) image sizes, pixels.
        scale: range of the crop's share of the image's area.
        ratio: range of the crop's width / height.
        draws: (B, 2 * CROP_TRIES + 2) uniforms.

    Returns:
        anchors (B, 2) as (top, left) and shapes (B, 2) as (height, width), pixels.
    """
    area = (heights * widths)[:, None] * (scale[0] + draws[:, :CROP_TRIES] * (scale[1] - scale[0]))
    log_low, log_high = np.log(ratio[0]), np.log(ratio[1])
    aspect = np.exp(log_low + draws[:, CROP_TRIES : 2 * CROP_TRIES] * (log_high - log_low))
    w, h = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    fits = (w > 0) & (w <= widths[:, None]) & (h > 0) & (h <= heights[:, None])
    rows, first = np.arange(len(heights)), fits.argmax(axis=1)
    shapes = np.stack([h[rows, first], w[rows, first]], axis=1).astype(np.int64)
    room = np.stack([heights, widths], axis=1) - shapes + 1
    anchors = (draws[:, 2 * CROP_TRIES :] * room).astype(np.int64)  # floor: uniform over the places it fits

    none = ~fits.any(axis=1)
    if none.any():
        shapes[none] = _nearest_ratio(heights[none], widths[none], ratio)
        anchors[none] = (np.stack([heights, widths], axis=1)[none] - shapes[none]) // 2
    return anchors, shapes


def _nearest_ratio(heights: IntArray, widths: IntArray, ratio: tuple[float, float]) -> IntArray:
    h = np.where(widths / heights < ratio[0], np.rint(widths / ratio[0]), heights)
    w = np.where(widths / heights > ratio[1], np.rint(heights * ratio[1]), widths)
    shapes: IntArray = np.maximum(np.stack([h, w], axis=1), 1).astype(np.int64)
    return shapes


def centre_crops(heights: IntArray, widths: IntArray, fraction: float) -> tuple[IntArray, IntArray]:
    """The central square of `fraction` of the short side: resize-then-centre-crop in the image's own pixels.

    Returns:
        anchors (B, 2) as (top, left) and shapes (B, 2) as (height, width), pixels.
    """
    side = np.maximum(np.rint(np.minimum(heights, widths) * fraction), 1).astype(np.int64)
    shapes = np.stack([side, side], axis=1)
    anchors: IntArray = (np.stack([heights, widths], axis=1) - shapes) // 2
    return anchors, shapes


def flips(probability: float, draws: FloatArray) -> BoolArray:
    """Which samples to flip horizontally. draws: (B, 1) uniforms."""
    return draws[:, 0] < probability
