"""Rank 0's word reaches all ranks for the same step, without anyone waiting for it."""

from ranks import run_ranks

from pipeline.training.control import ControlBroadcast, ControlFlags

NUM_STEPS = 6


def hear(rank: int, world_size: int) -> list[ControlFlags]:
    control = ControlBroadcast(world_size, timeout_s=30)
    # What other ranks say does not count.
    heard = [control.exchange(ControlFlags(stop=rank > 0 or step == 3, save=step == 1)) for step in range(NUM_STEPS)]
    return [*heard, control.finish(), control.finish()]


def test_all_ranks_hear_rank_0_one_step_later() -> None:
    expected = [ControlFlags()] * (NUM_STEPS + 2)
    expected[2], expected[4] = ControlFlags(save=True), ControlFlags(stop=True)
    assert run_ranks(hear, 3) == [expected] * 3


def test_one_rank_hears_itself_at_once() -> None:
    assert ControlBroadcast(1, timeout_s=30).exchange(ControlFlags(save=True)) == ControlFlags(save=True)
