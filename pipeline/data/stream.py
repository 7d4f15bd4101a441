"""The exact data stream: which samples form a batch, and the random numbers that belong to each.

Everything here is a pure function of `(seed, epoch, position)`: no state, no I/O, no dependence on
the number of ranks, threads, or on where training was interrupted. A *position* is a place in one
epoch's shuffled order, which a keyed permutation maps to a sample's row in the index.

Randomness is counter-based (Philox, Salmon et al. 2011, "Parallel Random Numbers: As Easy as
1, 2, 3"): the numbers of a position are looked up, not drawn in sequence. Each purpose has a counter
space of its own, so that a new augmentation never changes the draws of an old one.
"""

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import UserError

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]

FEISTEL_ROUNDS = 6


class Purpose(IntEnum):
    """Counter spaces of the draws. Numbers are part of the stream's definition: append, never change."""

    ORDER = 0
    CROP = 1
    FLIP = 2
    BLOCKS = 3
    WINDOW = 4
    SHIFT = 5
    JITTER = 6
    AUGMENT = 7
    ERASE = 8
    MIX = 9
    DROP_PATH = 10


def steps_per_epoch(num_samples: int, global_batch: int) -> int:
    """Optimizer steps of an epoch; its last partial global batch is dropped.

    Raises:
        UserError: not one whole batch.
    """
    if num_samples < global_batch:
        raise UserError(f"{num_samples} training images do not fill one train.global_batch={global_batch}; lower it")
    return num_samples // global_batch


def shard_bounds(num_items: int, rank: int, world_size: int) -> tuple[int, int]:
    """The contiguous part [start, stop) of `num_items` that `rank` takes; sizes differ by one at most."""
    return num_items * rank // world_size, num_items * (rank + 1) // world_size


@dataclass(frozen=True)
class DeterministicSampler:
    """The order of one training.

    num_samples: rows of the index. global_batch: images per step. block: rows that are read in sequence, or None
    to shuffle all rows. window: blocks that are shuffled into each other. repeats: copies of an image in a global
    batch, which they must divide. unit: positions that no boundary between ranks parts.
    """

    num_samples: int
    global_batch: int
    seed: int
    block: int | None = None
    window: int = 64
    repeats: int = 1
    unit: int = 1

    @property
    def steps_per_epoch(self) -> int:
        return steps_per_epoch(self.num_samples, self.global_batch)

    def positions(self, step: int, rank: int, world_size: int) -> tuple[int, int, int]:
        """Where a rank's part of global batch `step` lies.

        Args:
            step: steps done before this one, over all epochs.

        Returns:
            (epoch, start, stop): positions [start, stop) of that epoch's order.
        """
        epoch, k = divmod(step, self.steps_per_epoch)
        start, stop = shard_bounds(self.global_batch // self.unit, rank, world_size)
        return epoch, k * self.global_batch + start * self.unit, k * self.global_batch + stop * self.unit

    def rows(self, epoch: int, start: int, stop: int) -> IntArray:
        """The rows at positions [start, stop) of an epoch's order."""
        batch, offset = np.divmod(np.arange(start, stop), self.global_batch)
        distinct = self.global_batch // self.repeats
        # Copies lie as far apart in a batch as they can: on other ranks, and never in one pair to be mixed.
        order = batch * distinct + offset % distinct
        if self.block is None:
            return permute(order, self.num_samples, self.seed, epoch)
        return permute_blocks(order, self.num_samples, self.seed, epoch, self.block, self.window)

    def shares(self, world_size: int) -> list[int]:
        """How many images each rank gets in a step."""
        parts = (self.positions(0, rank, world_size) for rank in range(world_size))
        return [stop - start for _, start, stop in parts]


def permute(
    positions: IntArray, num_samples: int, seed: int, epoch: int, purpose: Purpose = Purpose.ORDER, number: int = 0
) -> IntArray:
    """Map positions of an epoch's order to sample rows: a keyed bijection of [0, num_samples).

    A balanced Feistel network over the smallest even number of bits that holds `num_samples`, with
    cycle-walking: a value that falls outside is encrypted again until it is inside (Black & Rogaway
    2002, "Ciphers with Arbitrary Finite Domains"). The domain is less than four times `num_samples`, so
    a position takes four tries at most on average. Time and memory are proportional to `positions`.

    Args:
        positions: (B,) in [0, num_samples).
        purpose, number: which of an epoch's permutations.

    Returns:
        (B,) rows, distinct for distinct positions.
    """
    half = np.uint64(max(1, (int(num_samples - 1).bit_length() + 1) // 2))
    counter = _counter(purpose, number * -(-FEISTEL_ROUNDS // 4))  # a Philox counter yields four numbers
    keys = np.random.Philox(key=_key(seed, epoch), counter=counter).random_raw(FEISTEL_ROUNDS)
    values = positions.astype(np.uint64)
    outside = np.ones(len(values), dtype=bool)
    while outside.any():
        values[outside] = _feistel(values[outside], half, keys)
        outside = values >= num_samples
    return values.astype(np.int64)


def permute_blocks(positions: IntArray, num_samples: int, seed: int, epoch: int, block: int, window: int) -> IntArray:
    """The block-shuffled order: a keyed bijection of [0, num_samples) that reads nearly in sequence.

    Blocks of `block` neighbouring rows are shuffled, and the rows of each `window` blocks among themselves, so
    that at any time only a window's blocks are read. Where the blocks begin is another row in each epoch, so that
    neighbours are parted sooner or later, and the rows left over by the last whole block are others each time.
    """
    num_blocks = num_samples // block
    if num_blocks < 2:
        return permute(positions, num_samples, seed, epoch)
    rows = np.empty_like(positions)
    for w in np.unique(positions // (block * window)).tolist():
        first = w * window
        here = min(window, num_blocks - first)  # whole blocks in this window
        begin, end = first * block, (first + here) * block
        inside = (positions >= begin) & (positions < end)
        shuffled = permute(positions[inside] - begin, end - begin, seed, epoch, Purpose.WINDOW, w)
        blocks = permute(first + shuffled // block, num_blocks, seed, epoch, Purpose.BLOCKS)
        rows[inside] = blocks * block + shuffled % block
    rest = positions >= num_blocks * block
    rows[rest] = positions[rest]
    shift = int(uniforms(Purpose.SHIFT, seed, epoch, 0, 1, 1)[0, 0] * num_samples)
    return (rows + shift) % num_samples


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
