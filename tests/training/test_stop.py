"""A wish to stop beside an evaluation: the checkpoint comes first, and the evaluation is made up for."""

import dataclasses
import json
import shutil
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from commands import differences
from ranks import FAST, context, final_state, run_ranks

from pipeline.config.loading import load
from pipeline.data.indexing.build import build_index
from pipeline.events import AttemptEnded, AttemptStarted, Evaluated, Event, StepLogged, Warned
from pipeline.failures import StoppedWaitingError
from pipeline.runs.checkpoint import META
from pipeline.runs.spec import RunSpec, StopReason, WorkerContext
from pipeline.storage import Storage
from pipeline.training import loop, setup
from pipeline.training.loop import fit

EVALUATED = 2  # step: an evaluation, and a checkpoint that is due
# 130 images: 2 steps an epoch. Four chunks to evaluate.
SETTINGS = ["train.global_batch=65", "train.steps=5", "train.eval_batch=40", "checkpoint.every=2", "train.log_every=1"]


@pytest.fixture
def spec(digits_index: Callable[[str], Path], tmp_path: Path) -> Callable[..., RunSpec]:
    def make(name: str) -> RunSpec:
        few = digits_index("few")
        cfg = load(None, [f"data.train={few}", f"data.val={few}", *FAST, *SETTINGS, f"run.storage={tmp_path}"])
        (tmp_path / name).mkdir()
        return RunSpec(cfg, Storage(tmp_path / name), str(few), str(few))

    return make


def metas(spec: RunSpec) -> dict[str, dict[str, Any]]:
    """The scores and the best so far, by checkpoint."""
    found = {name: json.loads((spec.checkpoints / name).read_bytes(META)) for name in spec.checkpoints.names()}
    return {name: meta["metrics"] for name, meta in found.items()}


def scores(events: list[Event]) -> list[tuple[int, float]]:
    return [(e.step, e.scores["loss"]) for e in events if isinstance(e, Evaluated)]


def stopping(events: list[Event], when: Callable[[Event], bool], rank: int = 0, world_size: int = 1) -> WorkerContext:
    """A rank that is asked to stop from the first such event on."""
    asked = list[Event]()

    def emit(event: Event) -> None:
        events.append(event)
        asked.extend([event] if when(event) else [])

    def reason() -> StopReason | None:
        return "interrupted" if asked else None

    return dataclasses.replace(context(rank, world_size), emit=emit, stop_reason=reason)


def is_evaluated_step(event: Event) -> bool:
    return isinstance(event, StepLogged) and event.step == EVALUATED


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def stop_and_resume(rank: int, world_size: int, whole: RunSpec, parts: RunSpec) -> list[Any]:
    """Whole; and stopped where the loop has logged the step, in the middle of its evaluation or just before it."""
    undisturbed, first, second = list[Event](), list[Event](), list[Event]()
    fit(whole, context(rank, world_size, undisturbed))
    stopped = fit(parts, stopping(first, is_evaluated_step, rank, world_size))
    barrier()  # rank 0 has more to do
    between = metas(parts)
    barrier()
    done = fit(parts, context(rank, world_size, second))
    return [stopped, done, between, *map(scores, (undisturbed, first, second))]


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_stop_in_an_evaluation_saves_at_once_and_evaluates_later(
    spec: Callable[..., RunSpec], world_size: int
) -> None:
    whole, parts = spec("whole"), spec("parts")
    results = run_ranks(stop_and_resume, world_size, whole, parts)[0]
    stopped, done, between, undisturbed, first, second = results
    assert (stopped["status"], stopped["step"], done["status"], done["step"]) == ("interrupted", EVALUATED, "done", 5)
    assert first == []
    assert between == {"step_00000002": {}}
    assert second == undisturbed
    assert [step for step, _ in undisturbed] == [2, 4, 5]
    ours, theirs = metas(parts), metas(whole)
    for name in ("step_00000002", "step_00000005"):  # where the disk is slow, the one of step 4 is postponed
        assert ours[name] == theirs[name] != {}
    assert differences(final_state(whole), final_state(parts)) == []
    assert done["best_checkpoint"].rpartition("/")[2] in ours


def test_a_stop_at_the_last_evaluation_is_no_end(spec: Callable[..., RunSpec]) -> None:
    one, events = spec("run"), list[Event]()
    stopped = fit(one, stopping(events, lambda event: isinstance(event, StepLogged) and event.step == 5))
    assert (stopped["status"], stopped["step"]) == ("interrupted", 5)
    assert [step for step, _ in scores(events)] == [2, 4]
    events.clear()
    again = fit(one, stopping(events, lambda event: isinstance(event, AttemptStarted)))
    assert (again["status"], scores(events)) == ("interrupted", [])
    done = fit(one, context(events=events))
    assert (done["status"], [step for step, _ in scores(events)]) == ("done", [5])
    assert done["top1"] is not None


def test_an_attempt_that_dies_in_an_evaluation_has_its_checkpoint(
    spec: Callable[..., RunSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, events = spec("run"), list[Event]()

    def dies(*_: object, **__: object) -> None:
        raise RuntimeError("out of luck")

    with monkeypatch.context() as patch:
        patch.setattr(loop, "evaluate", dies)
        with pytest.raises(RuntimeError, match="out of luck"):
            fit(one, context())
    assert metas(one) == {"step_00000002": {}}
    fit(one, context(events=events))
    assert [step for step, _ in scores(events)] == [2, 4, 5]
    assert [event.step for event in events if isinstance(event, StepLogged)] == [3, 4, 5]


@pytest.mark.parametrize(("split", "after", "eval_every"), [("train", 1, 9), ("val", EVALUATED, 1)])
def test_a_stop_is_heard_while_images_do_not_come(
    digits_index: Callable[[str], Path],
    digits: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    split: str,
    after: int,
    eval_every: int,
) -> None:
    """The last step that is done is saved, and goes on bitwise. (Of two workers: tests/e2e/test_launch.py.)"""
    monkeypatch.setattr(setup, "STOP_WAIT_S", 0.5)
    digits_index("few")
    for name in ("train", "val"):
        shutil.copytree(digits / "few", tmp_path / name)
        build_index(tmp_path / name)[0].save(tmp_path / f"{name}.arrow")
    # Far less is read ahead than there is to train on.
    more = ["train.steps=8", "checkpoint.every=100", "data.prefetch=1", f"train.eval_every={eval_every}"]

    def spec(run: str) -> RunSpec:
        cfg = load(None, ["data.train=x", "data.val=x", *FAST, *SETTINGS, *more, f"run.storage={tmp_path}"])
        (tmp_path / run).mkdir()
        return RunSpec(cfg, Storage(tmp_path / run), str(tmp_path / "train.arrow"), str(tmp_path / "val.arrow"))

    events, times = list[Event](), list[float]()

    def progress(step: int) -> None:
        times.append(time.monotonic())
        if step == after:
            (tmp_path / split).rename(tmp_path / "away")

    def reason() -> StopReason | None:
        """To stop, once what was read ahead is used up."""
        is_away = any(isinstance(event, Warned) and "does not answer" in event.text for event in events)
        longest = max([1.0, *(b - a for a, b in pairwise(times))])
        return "interrupted" if is_away and time.monotonic() - times[-1] > 4 * longest else None

    whole, parts = spec("whole"), spec("parts")
    undisturbed = list[Event]()
    fit(whole, context(events=undisturbed))
    with pytest.raises(StoppedWaitingError, match="the next images have not come"):
        fit(parts, dataclasses.replace(context(events=events), progress=progress, stop_reason=reason))
    last = [event.step for event in events if isinstance(event, StepLogged)][-1]
    assert after <= last < 8
    (ended,) = (event.summary for event in events if isinstance(event, AttemptEnded))
    assert (ended["status"], ended["step"]) == ("interrupted", last)
    assert list(metas(parts)) == [f"step_{last:08d}"]
    assert json.loads(parts.run.read_bytes("run.json"))["open"] is False

    (tmp_path / "away").rename(tmp_path / split)
    resumed = list[Event]()
    assert fit(parts, context(events=resumed))["status"] == "done"
    assert next(event for event in resumed if isinstance(event, AttemptStarted)).step == last
    assert scores(resumed) == scores(undisturbed)
    assert differences(final_state(whole), final_state(parts)) == []
