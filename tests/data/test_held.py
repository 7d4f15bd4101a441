"""What a GPU still reads is held, and a host that is far ahead of it waits."""

import itertools
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.data.batch_spec import BatchSpec
from pipeline.data.loading.fetch import EncodedBatch
from pipeline.data.loading.held import MAX_BEHIND, HeldWhileRead

NONE: NDArray[np.int64] = np.zeros(0, np.int64)
EMPTY = EncodedBatch(BatchSpec(NONE, NONE, 8, NONE, NONE, NONE.astype(bool)), NONE.astype(np.uint8), NONE, NONE, {})


@dataclass
class Event:
    """Of a device that comes to it when somebody waits, or when a test says so."""

    is_over: bool = False
    num_waits: int = 0

    def query(self) -> bool:
        return self.is_over

    def synchronize(self) -> None:
        self.num_waits += 1
        self.is_over = True


def hold(held: HeldWhileRead, released: list[int], numbers: range) -> None:
    for number in numbers:
        held.add(replace(EMPTY, release=partial(released.append, number)), f"images {number}")


def test_a_batch_is_held_until_the_device_has_read_it() -> None:
    events = [Event(), Event(), Event()]
    released, held = list[int](), HeldWhileRead(iter(events).__next__)
    hold(held, released, range(2))
    assert (released, len(held.batches)) == ([], 2)
    events[0].is_over = True
    hold(held, released, range(2, 3))
    assert released == [0]
    assert [event.num_waits for event in events] == [0, 0, 0], "nobody waits where the device keeps up"


def test_a_host_that_is_far_ahead_waits() -> None:
    events = [Event() for _ in range(6)]
    released, held = list[int](), HeldWhileRead(iter(events).__next__)
    hold(held, released, range(6))
    assert len(held.batches) == MAX_BEHIND
    assert released == list(range(6 - MAX_BEHIND))
    assert [event.num_waits for event in events] == [1] * (6 - MAX_BEHIND) + [0] * MAX_BEHIND


@pytest.mark.parametrize("number", [1, 5])
def test_on_a_cpu_all_is_read_when_the_next_is_asked_for(number: int) -> None:
    released, held = list[int](), HeldWhileRead(itertools.repeat(None).__next__)
    hold(held, released, range(number))
    assert (released, held.batches) == (list(range(number)), [])
