"""Rank 0's word reaches all ranks for the same step, without anyone waiting for it."""

from ranks import run_ranks

from pipeline.training.control import Votes, Word

NUM_STEPS = 6


def hear(rank: int, world_size: int) -> list[Word]:
    votes = Votes(world_size, timeout_s=30)
    # What other ranks say does not count.
    heard = [votes.exchange(Word(stop=rank > 0 or step == 3, save=step == 1)) for step in range(NUM_STEPS)]
    return [*heard, votes.finish(), votes.finish()]


def test_all_ranks_hear_rank_0_one_step_later() -> None:
    expected = [Word()] * (NUM_STEPS + 2)
    expected[2], expected[4] = Word(save=True), Word(stop=True)
    assert run_ranks(hear, 3) == [expected] * 3


def test_one_rank_hears_itself_at_once() -> None:
    assert Votes(1, timeout_s=30).exchange(Word(save=True)) == Word(save=True)
