"""From random numbers to augmentation: what is cut out of each image, and what is done to it.

Pure functions of the uniforms that `stream` looks up; `dali` and `mix` carry out what they say. The laws are
torchvision's where it has one.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pipeline.config.data import DataConfig
from pipeline.data.stream import BoolArray, FloatArray, IntArray

TRIES = 10  # torchvision's, of RandomResizedCrop and of RandomErasing
SIZE_STEP = 16  # pixels between the sizes of a progressive training
CROP_DRAWS = ERASE_DRAWS = 2 * TRIES + 2
NUM_BINS = {"trivial": 31, "rand": 31, "auto": 11}  # of magnitudes
MIX_ONE = 1 << 16  # the weights of a mixture are whole numbers, so that every device rounds alike


def random_resized_crops(
    sizes: IntArray, scale: tuple[float, float], ratio: tuple[float, float], draws: FloatArray
) -> tuple[IntArray, IntArray]:
    """Crops by the law of torchvision's RandomResizedCrop.

    Ten tries of (area, log aspect ratio), the first that fits wins; if none fits, the central crop
    whose aspect ratio is the nearest allowed one.

    Args:
        sizes: (B, 2) of the images as (height, width), pixels.
        scale: range of the crop's share of the image's area.
        ratio: range of the crop's width / height.
        draws: (B, CROP_DRAWS) uniforms.

    Returns:
        anchors (B, 2) as (top, left) and shapes (B, 2) as (height, width), pixels.
    """
    sides, fits = _first_that_fits(sizes.prod(axis=1), scale, ratio, draws, 1, sizes[:, ::-1])
    shapes = np.ascontiguousarray(sides[:, ::-1])
    anchors = (draws[:, 2 * TRIES :] * (sizes - shapes + 1)).astype(np.int64)  # floor: uniform over the places it fits
    if not fits.all():
        heights, widths = sizes[~fits].T
        h = np.where(widths / heights < ratio[0], np.rint(widths / ratio[0]), heights)
        w = np.where(widths / heights > ratio[1], np.rint(heights * ratio[1]), widths)
        shapes[~fits] = np.maximum(np.stack([h, w], axis=1), 1)
        anchors[~fits] = (sizes - shapes)[~fits] // 2
    return anchors, shapes


def _first_that_fits(
    areas: IntArray,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    draws: FloatArray,
    smallest: int,
    largest: IntArray,
) -> tuple[IntArray, BoolArray]:
    """Of TRIES rectangles the first whose sides are from `smallest` to `largest`, and whether there is one.

    Args:
        areas: (B,), of which `scale` is a range of shares. ratio: range of the first side / the second.
        draws: (B, >= 2 * TRIES) uniforms, of an area and of a ratio for each try.
        largest: (B, 2).

    Returns:
        (B, 2) sides and (B,).
    """
    shares = areas[:, None] * (scale[0] + draws[:, :TRIES] * (scale[1] - scale[0]))
    log_low, log_high = np.log(ratio[0]), np.log(ratio[1])
    aspect = np.exp(log_low + draws[:, TRIES : 2 * TRIES] * (log_high - log_low))
    sides = np.rint(np.sqrt(np.stack([shares * aspect, shares / aspect], axis=2)))
    fits = ((sides >= smallest) & (sides <= largest[:, None])).all(axis=2)
    return sides[np.arange(len(draws)), fits.argmax(axis=1)].astype(np.int64), fits.any(axis=1)


def short_side_crops(
    sizes: IntArray, size: int, lengths: tuple[int, int], draws: FloatArray
) -> tuple[IntArray, IntArray]:
    """The paper's scale augmentation (He et al. 2015, section 3.4), in the image's own pixels.

    The short side is resized to a length drawn from `lengths`, and a square of `size` is cut out anywhere.

    Args:
        sizes: (B, 2) of the images as (height, width), pixels.
        draws: (B, 3) uniforms.

    Returns:
        anchors (B, 2) as (top, left) and shapes (B, 2) as (height, width), pixels.
    """
    drawn = np.floor(lengths[0] + draws[:, 0] * (lengths[1] - lengths[0] + 1))
    shapes = _squares(sizes.min(axis=1) * size / drawn)
    return (draws[:, 1:] * (sizes - shapes + 1)).astype(np.int64), shapes


def _squares(sides: FloatArray) -> IntArray:
    """(B, 2) of the nearest whole numbers of pixels, at least one."""
    return np.maximum(np.rint(sides), 1).astype(np.int64)[:, None].repeat(2, axis=1)


CENTRE = (0.5, 0.5)
FIVE = (CENTRE, (0.0, 0.0), (0.0, 1.0), (1.0, 0.0), (1.0, 1.0))  # and the corners


def crops_at(sizes: IntArray, fraction: float, place: tuple[float, float] = CENTRE) -> tuple[IntArray, IntArray]:
    """The square of `fraction` of the short side at a place: resize-then-crop in the image's own pixels.

    Args:
        sizes: (B, 2) of the images as (height, width), pixels.
        place: of the square, from (0, 0), top left, to (1, 1), bottom right.

    Returns:
        anchors (B, 2) as (top, left) and shapes (B, 2) as (height, width), pixels.
    """
    shapes = _squares(sizes.min(axis=1) * fraction)
    return ((sizes - shapes) * place).astype(np.int64), shapes


def flips(probability: float, draws: FloatArray) -> BoolArray:
    """Which samples to flip horizontally. draws: (B, 1) uniforms."""
    return draws[:, 0] < probability


def size_at(epoch: int, cfg: DataConfig) -> int:
    """Height and width of the images of an epoch, pixels: from start_size to image_size over grow_epochs.

    Rises in steps of SIZE_STEP, so that few sizes occur (Touvron et al. 2019, "Fixing the train-test resolution
    discrepancy"; FFCV's schedule).
    """
    start, end = cfg.start_size or cfg.image_size, cfg.image_size
    first, last = cfg.grow_epochs
    grown = (epoch - first) / (last - first) if last > first else float(epoch >= last)
    missing = (end - start) * (1 - min(max(grown, 0.0), 1.0))
    return max(start, end - SIZE_STEP * int(np.ceil(missing / SIZE_STEP)))


def jitters(strengths: tuple[float, float, float, float], draws: FloatArray) -> FloatArray:
    """Colour changes by the law of torchvision's ColorJitter.

    Args:
        strengths: of brightness, contrast, saturation, and hue (in turns of the colour wheel).
        draws: (B, 4) uniforms.

    Returns:
        (B, 4): three factors around 1, and degrees around 0.
    """
    strength = np.array(strengths)
    low, high = np.maximum(1 - strength, 0), 1 + strength
    low[3], high[3] = -360 * strength[3], 360 * strength[3]
    changes: FloatArray = low + draws * (high - low)
    return changes


def erasures(
    probability: float, scale: tuple[float, float], ratio: tuple[float, float], size: int, draws: FloatArray
) -> tuple[IntArray, IntArray]:
    """Rectangles by the law of torchvision's RandomErasing, in square images.

    Args:
        scale: range of the rectangle's share of the image's area.
        ratio: range of its height / width.
        size: of the images, pixels.
        draws: (B, 1 + ERASE_DRAWS) uniforms.

    Returns:
        anchors (B, 2) as (top, left) and shapes (B, 2) as (height, width), pixels; shape 0 where nothing is erased.
    """
    area, largest = np.array([size * size]), np.full((1, 2), size - 1)
    shapes, fits = _first_that_fits(area, scale, ratio, draws[:, 1:], 0, largest)
    shapes[~fits | (draws[:, 0] >= probability)] = 0
    anchors: IntArray = (draws[:, 1 + 2 * TRIES :] * (size - shapes + 1)).astype(np.int64)
    return anchors, shapes


def mixtures(mixup: float, cutmix: float, size: int, draws: FloatArray) -> tuple[IntArray, IntArray]:
    """How the two images of each pair are mixed (Zhang et al. 2018, "mixup"; Yun et al. 2019, "CutMix").

    Args:
        mixup, cutmix: alpha of Beta(alpha, alpha), 0 for off; where both are on, each pair takes one by a coin.
        size: of the images, pixels.
        draws: (P, 4) uniforms, one row a pair.

    Returns:
        weights (P,): of an image's own pixels, in 1/65536, where it is not cut.
        boxes (P, 4): top, left, bottom, right of what comes from the partner alone.
    """
    from scipy.special import betaincinv  # late: it takes longer to import than all that a process that reads needs

    cuts = draws[:, 0] * ((mixup > 0) + (cutmix > 0)) >= (mixup > 0)
    alpha = np.where(cuts, cutmix, mixup)
    own = betaincinv(alpha, alpha, draws[:, 1])  # the inverse distribution function: one uniform is one Beta number
    weights = np.where(cuts, MIX_ONE, np.rint(own * MIX_ONE)).astype(np.int64)
    half = 0.5 * size * np.sqrt(1 - own)
    y, x = draws[:, 2] * size, draws[:, 3] * size
    corners = np.stack([y - half, x - half, y + half, x + half], axis=1)
    boxes = np.where(cuts[:, None], np.clip(np.rint(corners), 0, size), 0).astype(np.int64)
    return weights, boxes


def drop_path_masks(rates: Sequence[float], draws: FloatArray) -> NDArray[np.float32]:
    """Stochastic depth (Huang et al. 2016): 0 where a sample skips a residual branch, else 1 / (1 - rate).

    Args:
        rates: of dropping, one a block.
        draws: (B, blocks) uniforms.

    Returns:
        (B, blocks) float32, 1 on average.
    """
    kept = 1 - np.array(rates)
    factors: NDArray[np.float32] = ((draws < kept) / kept).astype(np.float32)
    return factors


# The operations that an automatic augmentation chooses from. Their order is part of the stream's definition.
GEOMETRY = ("translate_x", "translate_y", "shear_x", "shear_y", "rotate")
COLOURS = ("brightness", "contrast", "color", "sharpness", "posterize", "solarize", "equalize", "auto_contrast")
OPERATIONS = {
    "trivial": (*GEOMETRY, *COLOURS, "identity"),
    "rand": (*GEOMETRY, *COLOURS, "identity"),
    "auto": (*GEOMETRY[1:], "color", "posterize", "solarize", "solarize_add", "invert", *COLOURS[-2:], "identity"),
}
# AutoAugment's policy for ImageNet (Cubuk et al. 2019, Table 9): of 25 pairs one is drawn; each of its
# operations is (name, probability, magnitude's bin).
AUTO_POLICY = (
    (("equalize", 0.8, 0), ("shear_y", 0.8, 4)),
    (("color", 0.4, 9), ("equalize", 0.6, 0)),
    (("color", 0.4, 1), ("rotate", 0.6, 8)),
    (("solarize", 0.8, 3), ("equalize", 0.4, 0)),
    (("solarize", 0.4, 2), ("solarize", 0.6, 2)),
    (("color", 0.2, 0), ("equalize", 0.8, 0)),
    (("equalize", 0.4, 0), ("solarize_add", 0.8, 3)),
    (("shear_x", 0.2, 9), ("rotate", 0.6, 8)),
    (("color", 0.6, 1), ("equalize", 1.0, 0)),
    (("invert", 0.4, 0), ("rotate", 0.6, 0)),
    (("equalize", 1.0, 0), ("shear_y", 0.6, 3)),
    (("color", 0.4, 7), ("equalize", 0.6, 0)),
    (("posterize", 0.4, 6), ("auto_contrast", 0.4, 0)),
    (("solarize", 0.6, 8), ("color", 0.6, 9)),
    (("solarize", 0.2, 4), ("rotate", 0.8, 9)),
    (("rotate", 1.0, 7), ("translate_y", 0.8, 9)),
    (("solarize", 0.8, 4), ("identity", 1.0, 0)),
    (("shear_y", 0.8, 0), ("color", 0.6, 4)),
    (("color", 1.0, 0), ("rotate", 0.6, 2)),
    (("equalize", 0.8, 0), ("identity", 1.0, 0)),
    (("equalize", 1.0, 0), ("auto_contrast", 0.6, 0)),
    (("shear_y", 0.4, 7), ("solarize_add", 0.6, 7)),
    (("posterize", 0.8, 2), ("solarize", 0.6, 10)),
    (("solarize", 0.6, 8), ("equalize", 0.6, 0)),
    (("color", 0.8, 6), ("rotate", 0.4, 5)),
)


def num_operations(cfg: DataConfig) -> int:
    """Operations in a row of the automatic augmentation."""
    return {"none": 0, "trivial": 1, "rand": cfg.rand_ops, "auto": 2}[cfg.auto_augment]


def num_policy_draws(cfg: DataConfig) -> int:
    """Uniforms that `operations` takes for a sample."""
    return {"none": 0, "trivial": 3, "rand": 2 * cfg.rand_ops, "auto": 5}[cfg.auto_augment]


def operations(cfg: DataConfig, draws: FloatArray) -> IntArray:
    """What an automatic augmentation does to each image.

    TrivialAugmentWide (Mueller & Hutter 2021): one operation at a random strength. RandAugment (Cubuk et al. 2020):
    rand_ops of them at rand_magnitude. AutoAugment: one of its policy's pairs.

    Args:
        draws: (B, num_policy_draws) uniforms.

    Returns:
        (B, N, 3): of N operations in a row the place in OPERATIONS, the magnitude's bin, and the sign (1: minus).
    """
    names, (b, _) = OPERATIONS[cfg.auto_augment], draws.shape
    if cfg.auto_augment == "trivial":
        chosen = draws[:, None, :] * [len(names), NUM_BINS["trivial"], 2]
    elif cfg.auto_augment == "rand":
        pairs = draws.reshape(b, cfg.rand_ops, 2)
        bins = np.full((b, cfg.rand_ops), cfg.rand_magnitude)
        chosen = np.stack([pairs[..., 0] * len(names), bins, pairs[..., 1] * 2], axis=2)
    else:
        number = np.array([[names.index(name) for name, _, _ in pair] for pair in AUTO_POLICY])
        probability = np.array([[p for _, p, _ in pair] for pair in AUTO_POLICY])
        magnitude = np.array([[m for _, _, m in pair] for pair in AUTO_POLICY])
        pair = (draws[:, 0] * len(AUTO_POLICY)).astype(np.int64)
        applied = np.where(draws[:, 1:3] < probability[pair], number[pair], names.index("identity"))
        chosen = np.stack([applied, magnitude[pair], draws[:, 3:5] * 2], axis=2)
    floored: IntArray = chosen.astype(np.int64)
    return floored
