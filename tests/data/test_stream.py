"""The exact data stream's arithmetic: what would break if any of it changed with ranks, order or version."""

import math
from itertools import pairwise

import numpy as np
import pytest

from pipeline.data import stream
from pipeline.data.stream import DeterministicSampler, Purpose
from pipeline.errors import UserError


@pytest.mark.parametrize("num_samples", [1, 2, 3, 5, 64, 65, 1437, 100_003])
def test_permute_is_a_bijection(num_samples: int) -> None:
    rows = stream.permute(np.arange(num_samples), num_samples, seed=7, epoch=3)
    assert np.array_equal(np.sort(rows), np.arange(num_samples))


def test_permute_of_a_slice_is_the_slice_of_the_permutation() -> None:
    whole = stream.permute(np.arange(1437), 1437, seed=0, epoch=0)
    assert np.array_equal(stream.permute(np.arange(700, 732), 1437, seed=0, epoch=0), whole[700:732])


def test_permute_needs_no_memory_of_the_data_sets_size() -> None:
    rows = stream.permute(np.arange(10**12 - 4, 10**12), 10**12, seed=0, epoch=0)
    assert len(set(rows.tolist())) == 4
    assert rows.min() >= 0
    assert rows.max() < 10**12


def test_orders_differ_between_epochs_and_seeds() -> None:
    n = 10_000
    orders = [stream.permute(np.arange(n), n, seed, epoch) for seed, epoch in [(0, 0), (0, 1), (1, 0)]]
    for i, j in [(0, 1), (0, 2), (1, 2)]:
        assert (orders[i] == orders[j]).sum() < 10  # a fixed point is expected once in two random orders


@pytest.mark.parametrize("num_samples", [20, 100, 1440])
def test_every_sample_reaches_every_place(num_samples: int) -> None:
    """Chi-square over 20 x 20 (place, sample) cells in 2,000 epochs; 361 degrees of freedom."""
    epochs, cells = 2000, np.zeros((20, 20))
    place = np.arange(num_samples) * 20 // num_samples
    for epoch in range(epochs):
        np.add.at(cells, (place, stream.permute(np.arange(num_samples), num_samples, 0, epoch) * 20 // num_samples), 1)
    expected = cells.sum() / cells.size
    chi_square = ((cells - expected) ** 2 / expected).sum() * (num_samples - 1) / num_samples
    assert abs(chi_square - 361) < 5 * math.sqrt(2 * 361)


def test_small_orders_are_all_equally_likely() -> None:
    """Chi-square over the 24 orders of 4 samples; 23 degrees of freedom."""
    drawn = [tuple(stream.permute(np.arange(4), 4, seed, epoch)) for seed in range(10) for epoch in range(480)]
    counts = np.unique(np.array(drawn), axis=0, return_counts=True)[1]
    assert len(counts) == 24
    assert ((counts - 200) ** 2 / 200).sum() < 23 + 5 * math.sqrt(46)


def test_stream_is_pinned() -> None:
    """A change of these numbers changes the data stream of every run that is under way."""
    assert stream.permute(np.arange(6), 1437, seed=0, epoch=0).tolist() == PINNED_ROWS
    draws = stream.uniforms(Purpose.CROP, seed=1, epoch=2, start=3, stop=4, num_draws=3)
    assert draws[0].tolist() == PINNED_DRAWS


PINNED_ROWS = [1344, 443, 457, 1301, 274, 950]
PINNED_DRAWS = [0.5244794198342909, 0.8160846990878203, 0.5905581336189876]


@pytest.mark.parametrize(("global_batch", "world_size"), [(64, 3), (7, 4), (5, 5), (256, 1)])
def test_shares_are_contiguous_and_even_to_one(global_batch: int, world_size: int) -> None:
    parts = [stream.shard_bounds(global_batch, rank, world_size) for rank in range(world_size)]
    assert parts[0][0] == 0
    assert parts[-1][1] == global_batch
    assert all(a[1] == b[0] for a, b in pairwise(parts))
    sizes = [stop - start for start, stop in parts]
    assert max(sizes) - min(sizes) <= 1


def test_an_epoch_uses_each_sample_at_most_once_and_drops_the_partial_batch() -> None:
    stream = DeterministicSampler(num_samples=1437, global_batch=64, seed=0)
    per_epoch = stream.steps_per_epoch
    seen = np.concatenate([stream.rows(*stream.positions(step, 0, 1)) for step in range(per_epoch)])
    assert len(seen) == len(set(seen.tolist())) == per_epoch * 64
    assert 1437 - len(seen) < 64
    assert stream.positions(per_epoch, 0, 1)[:2] == (1, 0)


def test_too_few_images_for_a_batch_are_refused() -> None:
    with pytest.raises(UserError, match=r"63 training images do not fill one train.global_batch=64"):
        stream.steps_per_epoch(63, 64)


def test_draws_of_a_position_do_not_depend_on_the_slice() -> None:
    whole = stream.uniforms(Purpose.CROP, 0, 5, 0, 100, 22)
    assert np.array_equal(stream.uniforms(Purpose.CROP, 0, 5, 37, 41, 22), whole[37:41])


def test_draws_are_uniform_and_purposes_independent() -> None:
    crop = stream.uniforms(Purpose.CROP, 0, 0, 0, 100_000, 1)[:, 0]
    flip = stream.uniforms(Purpose.FLIP, 0, 0, 0, 100_000, 1)[:, 0]
    for draws in (crop, flip):
        counts = np.histogram(draws, bins=100, range=(0, 1))[0]
        assert ((counts - 1000) ** 2 / 1000).sum() < 99 + 5 * math.sqrt(2 * 99)
    assert abs(np.corrcoef(crop, flip)[0, 1]) < 0.02


BLOCKS = [(1440, 8, 4), (1437, 10, 7), (100, 64, 64), (3, 8, 4), (1000, 1, 5), (999, 1000, 2), (4096, 64, 3)]


@pytest.mark.parametrize(("num_samples", "block", "window"), BLOCKS)
def test_the_block_order_is_a_bijection_of_which_any_slice_can_be_had(
    num_samples: int, block: int, window: int
) -> None:
    whole = stream.permute_blocks(np.arange(num_samples), num_samples, 7, 3, block, window)
    assert np.array_equal(np.sort(whole), np.arange(num_samples))
    some = np.arange(num_samples // 3, num_samples // 2)
    assert np.array_equal(stream.permute_blocks(some, num_samples, 7, 3, block, window), whole[some])


def test_the_block_order_reads_few_blocks_at_a_time() -> None:
    n, block, window = 10_000, 50, 4
    order = stream.permute_blocks(np.arange(n), n, 0, 0, block, window)
    for start in range(0, n, 200):
        places = np.unique(order[start : start + 200] // block)
        assert len(places) <= 2 * window  # 4 blocks, each of which may lie across a multiple of 50


ORDERS = {
    "full": lambda n, epoch: stream.permute(np.arange(n), n, 0, epoch),
    "blocks": lambda n, epoch: stream.permute_blocks(np.arange(n), n, 0, epoch, 8, 4),
}


@pytest.mark.parametrize("kind", ORDERS)
def test_a_sample_comes_at_any_time_and_independently_in_each_epoch(kind: str) -> None:
    """Chi-square of one sample's time of an epoch (19 degrees of freedom), and of it in pairs of epochs (24)."""
    n, epochs = 359, 500
    times = np.array([np.argsort(ORDERS[kind](n, epoch))[[0, 200, 358]] for epoch in range(epochs)])
    for when in times.T:
        counts = np.bincount(when * 20 // n, minlength=20)
        assert ((counts - epochs / 20) ** 2 / (epochs / 20)).sum() < 19 + 5 * math.sqrt(2 * 19)
        fifth = when * 5 // n
        pairs = np.bincount(fifth[1:] * 5 + fifth[:-1], minlength=25)
        assert ((pairs - epochs / 25) ** 2 / (epochs / 25)).sum() < 24 + 5 * math.sqrt(2 * 24)


def test_neighbours_of_the_full_order_are_strangers() -> None:
    """Chi-square of the distance in rows from one position to the next; 39 degrees of freedom."""
    n, counts = 4001, np.zeros(40)
    for epoch in range(20):
        distance = np.diff(ORDERS["full"](n, epoch)) % n - 1  # 0 to n - 2
        counts += np.bincount(distance * 40 // (n - 1), minlength=40)
    expected = counts.sum() / 40
    assert ((counts - expected) ** 2 / expected).sum() < 39 + 5 * math.sqrt(2 * 39)


def test_neighbours_of_the_block_order_are_of_one_block_as_often_as_chance_has_it() -> None:
    """Of 32 rows of 4 blocks: 7 of the 31 others are of the same block, and these lie less than 8 rows apart."""
    n, near, epochs = 3200, 0, 20
    for epoch in range(epochs):
        order = ORDERS["blocks"](n, epoch)
        inside = np.arange(n - 1) % 32 != 31
        near += int((np.abs(np.diff(order))[inside] < 8).sum())
    expected = epochs * (n / 32) * 31 * 7 / 31
    assert abs(near - expected) < 0.05 * expected


def test_blocks_begin_elsewhere_in_each_epoch() -> None:
    """Rows 0 and 1 are parted by a block's boundary sometimes, and near each other in time at most other times."""
    n = 800
    apart = [abs(int(np.diff(np.argsort(ORDERS["blocks"](n, epoch))[:2])[0])) >= 32 for epoch in range(200)]
    assert 10 < sum(apart) < 40  # one in eight, less those whose blocks share a window


def test_copies_of_an_image_are_in_one_batch_and_on_other_ranks() -> None:
    stream = DeterministicSampler(num_samples=1437, global_batch=60, seed=0, repeats=3)
    first, second = (stream.rows(*stream.positions(step, 0, 1)) for step in (0, 1))
    assert all((np.unique(rows, return_counts=True)[1] == 3).all() for rows in (first, second))
    assert not set(first) & set(second)
    ranks = [stream.rows(*stream.positions(0, rank, 3)).tolist() for rank in range(3)]
    assert all(len(set(rows)) == 20 for rows in ranks)
    assert ranks[0] == ranks[1] == ranks[2]


@pytest.mark.parametrize("shares", [[50], [24, 26], [16, 16, 18], [12, 12, 12, 14]])
def test_pairs_stay_on_one_rank(shares: list[int]) -> None:
    world_size = len(shares)
    stream = DeterministicSampler(num_samples=1437, global_batch=50, seed=0, unit=2)
    parts = [stream.positions(1, rank, world_size)[1:] for rank in range(world_size)]
    assert (parts[0][0], parts[-1][1]) == (50, 100)
    assert all(start % 2 == 0 and stop % 2 == 0 for start, stop in parts)
    assert [stop - start for start, stop in parts] == stream.shares(world_size) == shares
