"""A rank that holds the others up is named, in the log, in MLflow and in the report."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlflow
import pytest
import torch
import torch.distributed as dist
from ranks import FAST, context, run_ranks

from pipeline.config.loading import load
from pipeline.events import Event, StepLogged, Warned
from pipeline.runs import checkpoint, resume
from pipeline.runs.spec import RunSpec
from pipeline.storage import Storage
from pipeline.tracking import ledger
from pipeline.training import loop
from pipeline.training.loop import fit
from pipeline.training.losses import LossReader
from pipeline.training.stragglers import NUM_LOGS, Stragglers

FOUR = ["a", "a", "b", "b"]


LONG = 20.0  # seconds between two logs, of whoever is as fast as most


def feed(
    stragglers: Stragglers, computing: list[float], waiting: list[float], times: int, long: float = LONG
) -> list[str]:
    """What is said in so many logs; seconds are given in times of `long`."""
    ours, theirs = ([long * s for s in part] for part in (computing, waiting))
    return [line for step in range(times) if (line := stragglers.add(step, ours, theirs)[1])]


def test_a_slow_rank_is_named_with_its_host_and_its_cause() -> None:
    computes, waits = Stragglers(FOUR, [8] * 4), Stragglers(FOUR, [8] * 4)
    assert feed(computes, [1, 1, 1.2, 1.05], [0] * 4, NUM_LOGS - 1) == []
    (line,) = feed(computes, [1, 1, 1.2, 1.05], [0] * 4, 1)
    assert "slowest: worker 2 on b takes 1.20 times the median's time, to compute; look at the device's clock" in line
    (line,) = feed(waits, [1] * 4, [0, 0, 0, 0.5], NUM_LOGS)
    assert "slowest: worker 3 on b takes 1.50 times the median's time, for its images; look" in line
    assert waits.found == {"worker 3 on b": "1.50 times the median's time, for its images, by step 4"}


def test_a_moment_is_not_enough() -> None:
    """Steps may be short: MLflow's import takes seconds of rank 0's process."""
    assert feed(Stragglers(FOUR, [8] * 4), [3, 1, 1, 1], [0] * 4, 19, long=1.0) == []
    assert len(feed(Stragglers(FOUR, [8] * 4), [3, 1, 1, 1], [0] * 4, 20, long=1.0)) == 1, "after a minute"


def test_who_is_slow_now_and_then_is_not() -> None:
    stragglers = Stragglers(FOUR, [8] * 4)
    for _ in range(20):
        assert feed(stragglers, [1, 1.5, 1, 1], [0] * 4, NUM_LOGS - 1) == []
        assert feed(stragglers, [1, 1.1, 1, 1], [0] * 4, 1) == []


def test_two_workers_are_held_beside_the_faster_one() -> None:
    assert len(feed(Stragglers(["a", "b"], [8, 8]), [1, 1.2], [0, 0], NUM_LOGS)) == 1


def test_more_images_may_take_longer() -> None:
    """Shares of 3, 3 and 4: a third more work is no fault, and two thirds more time are."""
    shares = [3, 3, 4]
    assert feed(Stragglers(FOUR[:3], shares), [3, 3, 4.5], [0] * 3, 10) == []
    assert len(feed(Stragglers(FOUR[:3], shares), [3, 3, 5], [0] * 3, NUM_LOGS)) == 1
    assert feed(Stragglers(FOUR[:3], [4, 4, 3]), [3, 3, 3.3], [0] * 3, 10) == []


def test_one_that_stays_slow_is_told_ever_more_rarely() -> None:
    """A week of steps gives a page of lines."""
    lines = feed(stragglers := Stragglers(FOUR, [8] * 4), [1, 2, 1, 1], [0] * 4, 100_000)
    assert len(lines) == 15, "after 5, 10, 20, ... slow ones"
    assert len(stragglers.found) == 1


def test_a_slow_half_of_a_cluster_is_one_line() -> None:
    stragglers = Stragglers([f"node-{rank}" for rank in range(100)], [8] * 100, {"worker 1 on gone": "2.00 times"})
    own = [1.2 + rank / 100 for rank in range(39, -1, -1)] + [1.0] * 60  # the slowest first
    (line,) = feed(stragglers, own, [0] * 100, NUM_LOGS)
    assert "slowest: worker 0 on node-0 takes 1.59 times" in line
    assert "; and 37 others are slow; look" in line
    assert line.count("takes") == 3
    assert len(stragglers.found) == 20, "the newest"
    assert list(stragglers.found)[-1] == "worker 0 on node-0"


def test_nothing_is_said_of_one_worker_or_before_anything_is_measured() -> None:
    assert Stragglers(["a"], [8]).add(1, [1.0], [1.0]) == ({}, "")
    assert Stragglers(FOUR, [8] * 4).add(1, [0.0] * 4, [0.0] * 4) == ({}, "")


def test_metrics_tell_the_slowest() -> None:
    metrics, _ = Stragglers(FOUR, [8] * 4).add(1, [1.0, 1.0, 3.0, 1.0], [1.0] * 4)
    assert metrics == {"perf/slowest_worker": 2.0, "perf/slowest_worker_ratio": 2.0}


def read(rank: int, world_size: int, late: bool) -> list[tuple[list[float], list[float]]]:
    """What ranks know of each other, of six intervals, the third of which is not logged."""
    seconds, came = [0.0], []
    vars(ledger)["time"] = SimpleNamespace(perf_counter=lambda: seconds[0])
    own = ledger.TimeLedger("recovery", before={"forward": 1000.0 * rank, "data wait": 50.0})
    reader = LossReader(context(rank, world_size), own, late=late)
    for n in range(1, 7):
        for name, s in [("forward", (rank + 1.0) * n), ("data wait", 1.0 * rank * n), ("evaluation", 7.0)]:
            own.start_phase(name)
            seconds[0] += s
        own.start_phase("logging")
        reader.add(torch.tensor(0.5))
        came += reader.end_interval(n, 0, is_logged=n != 3, now=n == 6)
    return [(interval.computing, interval.waiting) for interval in came if interval.is_logged]


@pytest.mark.parametrize("late", [True, False])
def test_each_rank_s_own_time_reaches_all(late: bool) -> None:
    """Not that of earlier attempts, nor the first interval's; and that of an interval that is not logged is kept."""
    of_ranks = run_ranks(read, 3, late)
    assert of_ranks[0] == of_ranks[1] == of_ranks[2]
    # Seconds of rank 0, whose interval n takes n: given with the next one, or the one after that.
    sent = [0, 0, 0, 2, 3, 4] if late else [0, 0, 2, 3, 4, 5]
    logged = [sent[0], sent[1], sent[2] + sent[3], sent[4], sent[5]]
    assert of_ranks[0] == [([n, 2 * n, 3 * n], [0, n, 2 * n]) for n in map(float, logged)]


def train(rank: int, world_size: int, spec: RunSpec) -> tuple[dict[str, Any], list[Event]]:
    """With rank 1 slower in computing, by a clock that only steps move."""
    own_step, events, seconds = vars(loop)["train_step"], list[Event](), [0.0]

    def slow_step(state: Any, net: Any, batch: Any, *args: Any, mark: Callable[[str], object], **kwargs: Any) -> Any:
        mark("forward")
        seconds[0] += 10.0 + 10.0 * rank
        return own_step(state, net, batch, *args, mark=mark, **kwargs)

    vars(loop)["train_step"] = slow_step
    vars(ledger)["time"] = SimpleNamespace(perf_counter=lambda: seconds[0])
    vars(loop)["socket"].gethostname = lambda: f"node-{rank}"
    summary = fit(spec, replace(context(rank, world_size), emit=events.append))
    dist.barrier()
    return summary, [event for event in events if isinstance(event, Warned | StepLogged)]


def test_a_training_names_it(digits_index: Callable[[str], Path], tmp_path: Path) -> None:
    index = digits_index("few")
    short = ["train.steps=9", "train.global_batch=8", "data.image_size=16", "data.val_resize=16", "train.log_every=1"]
    rest = ["train.eval_every=100", "checkpoint.every=100", "train.precision=fp32"]
    spec = RunSpec(
        load(None, [*FAST, *short, *rest, f"data.train={index}", f"data.val={index}", f"run.storage={tmp_path}"]),
        Storage(tmp_path),
        str(index),
        str(index),
    )
    (summary, events), (_, others) = run_ranks(train, 2, spec)
    assert others == [], "rank 0 tells"
    (line,) = [event.text for event in events if isinstance(event, Warned) and "slowest" in event.text]
    assert "slowest: worker 1 on node-1 takes 2.00 times the median's time, to compute; look" in line
    logged = [event.metrics for event in events if isinstance(event, StepLogged)]
    assert [m.get("perf/slowest_worker_ratio") for m in logged] == [None, None, *[2.0] * 7], "an interval late"
    run = mlflow.MlflowClient(summary["mlflow_uri"]).get_run(summary["mlflow_run_id"])
    found = "2.00 times the median's time, to compute, by step 7"
    assert run.data.tags["pipeline.stragglers"] == f"worker 1 on node-1: {found}"
    assert run.data.metrics["perf/slowest_worker"] == 1.0
    _, saved = resume.find_checkpoint(spec.run, None, print)
    assert saved is not None
    assert checkpoint.load(saved.place).meta["stragglers"] == {"worker 1 on node-1": found}
