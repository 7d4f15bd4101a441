"""Losses that are read one interval late."""

import pytest
import torch
from ranks import context

from pipeline.tracking.ledger import TimeLedger
from pipeline.training.losses import Interval, LossReader


@pytest.mark.parametrize("late", [True, False])
def test_each_interval_comes_once_and_in_order(late: bool) -> None:
    """Also with one that is not logged, and at the end none is owed."""
    reader = LossReader(context(), TimeLedger("forward"), late=late)
    came: list[Interval] = []
    num_kept = []
    for step in range(1, 11):
        reader.add(torch.tensor(float(step)))
        if step % 2 == 0:
            came += reader.end_interval(step, step // 5, is_logged=step != 4, now=step in (6, 10))
            num_kept.append(step // 2 - len(came))
    assert [i.step for i in came] == [2, 4, 6, 8, 10]
    assert [loss for i in came for loss in i.losses] == list(map(float, range(1, 11)))
    assert [i.num_bad for i in came] == [0, 0, 1, 1, 2]
    assert [i.is_logged for i in came] == [True, False, True, True, True]
    assert num_kept == ([1, 1, 0, 1, 0] if late else [0] * 5)
    seconds = [i.seconds["forward"] for i in came]
    assert seconds == sorted(seconds)
    assert len(set(seconds)) == 5, "each is of its own moment, and not of when it was read"
