"""The exact data stream's arithmetic: what would break if any of it changed with ranks, order or version."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torchvision.transforms import RandomResizedCrop

from pipeline.data import sampling
from pipeline.data.sampling import CROP_TRIES, Purpose


@pytest.mark.parametrize("num_samples", [1, 2, 3, 5, 64, 65, 1437, 100_003])
def test_permute_is_a_bijection(num_samples: int) -> None:
    rows = sampling.permute(np.arange(num_samples), num_samples, seed=7, epoch=3)
    assert np.array_equal(np.sort(rows), np.arange(num_samples))


def test_permute_of_a_slice_is_the_slice_of_the_permutation() -> None:
    whole = sampling.permute(np.arange(1437), 1437, seed=0, epoch=0)
    assert np.array_equal(sampling.permute(np.arange(700, 732), 1437, seed=0, epoch=0), whole[700:732])


def test_permute_needs_no_memory_of_the_data_sets_size() -> None:
    rows = sampling.permute(np.arange(10**12 - 4, 10**12), 10**12, seed=0, epoch=0)
    assert len(set(rows.tolist())) == 4
    assert rows.min() >= 0
    assert rows.max() < 10**12


def test_orders_differ_between_epochs_and_seeds() -> None:
    n = 10_000
    orders = [sampling.permute(np.arange(n), n, seed, epoch) for seed, epoch in [(0, 0), (0, 1), (1, 0)]]
    for i, j in [(0, 1), (0, 2), (1, 2)]:
        assert (orders[i] == orders[j]).sum() < 10  # a fixed point is expected once in two random orders


@pytest.mark.parametrize("num_samples", [20, 100, 1440])
def test_every_sample_reaches_every_place(num_samples: int) -> None:
    """Chi-square over 20 x 20 (place, sample) cells in 2,000 epochs; 361 degrees of freedom."""
    epochs, cells = 2000, np.zeros((20, 20))
    place = np.arange(num_samples) * 20 // num_samples
    for epoch in range(epochs):
        np.add.at(
            cells, (place, sampling.permute(np.arange(num_samples), num_samples, 0, epoch) * 20 // num_samples), 1
        )
    expected = cells.sum() / cells.size
    chi_square = ((cells - expected) ** 2 / expected).sum() * (num_samples - 1) / num_samples
    assert abs(chi_square - 361) < 5 * math.sqrt(2 * 361)


def test_small_orders_are_all_equally_likely() -> None:
    """Chi-square over the 24 orders of 4 samples; 23 degrees of freedom."""
    drawn = [tuple(sampling.permute(np.arange(4), 4, seed, epoch)) for seed in range(10) for epoch in range(480)]
    counts = np.unique(np.array(drawn), axis=0, return_counts=True)[1]
    assert len(counts) == 24
    assert ((counts - 200) ** 2 / 200).sum() < 23 + 5 * math.sqrt(46)


def test_stream_is_pinned() -> None:
    """A change of these numbers changes the data stream of every run that is under way."""
    assert sampling.permute(np.arange(6), 1437, seed=0, epoch=0).tolist() == PINNED_ROWS
    draws = sampling.uniforms(Purpose.CROP, seed=1, epoch=2, start=3, stop=4, num_draws=3)
    assert draws[0].tolist() == PINNED_DRAWS


PINNED_ROWS = [1344, 443, 457, 1301, 274, 950]
PINNED_DRAWS = [0.5244794198342909, 0.8160846990878203, 0.5905581336189876]


@pytest.mark.parametrize(("global_batch", "world_size"), [(64, 3), (7, 4), (5, 5), (256, 1)])
def test_shares_are_contiguous_and_even_to_one(global_batch: int, world_size: int) -> None:
    parts = [sampling.share(global_batch, rank, world_size) for rank in range(world_size)]
    assert parts[0][0] == 0
    assert parts[-1][1] == global_batch
    assert all(a[1] == b[0] for a, b in pairwise(parts))
    sizes = [stop - start for start, stop in parts]
    assert max(sizes) - min(sizes) <= 1


def test_an_epoch_uses_each_sample_at_most_once_and_drops_the_partial_batch() -> None:
    n, g = 1437, 64
    per_epoch = sampling.steps_per_epoch(n, g)
    seen = np.concatenate(
        [
            sampling.permute(np.arange(start, stop), n, 0, epoch)
            for step in range(per_epoch)
            for epoch, start, stop in [sampling.batch_positions(step, n, g, 0, 1)]
        ]
    )
    assert len(seen) == len(set(seen.tolist())) == per_epoch * g
    assert n - len(seen) < g
    assert sampling.batch_positions(per_epoch, n, g, 0, 1)[:2] == (1, 0)


def test_too_few_images_for_a_batch_are_refused() -> None:
    with pytest.raises(ValueError, match=r"63 training images do not fill one train.global_batch=64"):
        sampling.steps_per_epoch(63, 64)


def test_draws_of_a_position_do_not_depend_on_the_slice() -> None:
    whole = sampling.uniforms(Purpose.CROP, 0, 5, 0, 100, 22)
    assert np.array_equal(sampling.uniforms(Purpose.CROP, 0, 5, 37, 41, 22), whole[37:41])


def test_draws_are_uniform_and_purposes_independent() -> None:
    crop = sampling.uniforms(Purpose.CROP, 0, 0, 0, 100_000, 1)[:, 0]
    flip = sampling.uniforms(Purpose.FLIP, 0, 0, 0, 100_000, 1)[:, 0]
    for draws in (crop, flip):
        counts = np.histogram(draws, bins=100, range=(0, 1))[0]
        assert ((counts - 1000) ** 2 / 1000).sum() < 99 + 5 * math.sqrt(2 * 99)
    assert abs(np.corrcoef(crop, flip)[0, 1]) < 0.02


@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 375), (32, 32), (40, 900), (900, 40)])
def test_crops_follow_torchvisions_law(height: int, width: int) -> None:
    """Two-sample Kolmogorov-Smirnov on height, width, top and left of 4,000 crops, at a level of 1e-6."""
    n, scale, ratio = 4000, (0.08, 1.0), (3 / 4, 4 / 3)
    sizes = np.full(n, height), np.full(n, width)
    draws = sampling.uniforms(Purpose.CROP, 0, 0, 0, n, 2 * CROP_TRIES + 2)
    anchors, shapes = sampling.random_resized_crops(*sizes, scale, ratio, draws)
    assert (anchors >= 0).all()
    assert (shapes >= 1).all()
    assert (anchors + shapes <= [height, width]).all()
    torch.manual_seed(0)
    image = torch.empty(1, height, width)
    theirs = np.array([RandomResizedCrop.get_params(image, list(scale), list(ratio)) for _ in range(n)])
    ours = np.concatenate([anchors, shapes], axis=1)
    for mine, other in zip(ours.T, theirs.T, strict=True):
        points = np.unique(np.concatenate([mine, other]))
        gap = np.abs(_cdf(mine, points) - _cdf(other, points)).max()
        assert gap < math.sqrt(-math.log(1e-6 / 2) / n)


def _cdf(values: np.ndarray, points: np.ndarray) -> np.ndarray:
    return np.searchsorted(np.sort(values), points, side="right") / len(values)


def test_an_image_of_one_pixel_is_cropped_to_itself() -> None:
    draws = sampling.uniforms(Purpose.CROP, 0, 0, 0, 50, 2 * CROP_TRIES + 2)
    one = np.ones(50, dtype=np.int64)
    anchors, shapes = sampling.random_resized_crops(one, one, (0.08, 1.0), (3 / 4, 4 / 3), draws)
    assert (anchors == 0).all()
    assert (shapes == 1).all()


def test_centre_crops_are_square_and_central() -> None:
    anchors, shapes = sampling.centre_crops(np.array([256, 300]), np.array([400, 256]), 224 / 256)
    assert shapes.tolist() == [[224, 224], [224, 224]]
    assert anchors.tolist() == [[16, 88], [38, 16]]


def test_flips_have_their_probability() -> None:
    draws = sampling.uniforms(Purpose.FLIP, 0, 0, 0, 10_000, 1)
    assert sampling.flips(0.0, draws).sum() == 0
    assert sampling.flips(1.0, draws).sum() == 10_000
    assert abs(sampling.flips(0.3, draws).mean() - 0.3) < 0.02
