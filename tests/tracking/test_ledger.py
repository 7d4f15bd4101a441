"""The ledger: no second counted twice or lost, through failures and resumes; nearly free; nothing waits in a step."""

import dataclasses
import gzip
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import torch
from ranks import FAST, context, run_ranks

from pipeline.config.loading import load
from pipeline.data.loading.loader import Batch, TrainLoader
from pipeline.errors import UserError
from pipeline.events import Event, StepLogged, Warned
from pipeline.runs.manifest import RunManifest
from pipeline.runs.spec import RunSpec
from pipeline.storage import Storage
from pipeline.tracking.ledger import PHASES, TimeLedger, goodput, summed_up, total
from pipeline.tracking.metrics import Predictions
from pipeline.training.loop import fit


@pytest.fixture
def spec(digits_index: Callable[[str], Path], tmp_path: Path) -> Callable[..., RunSpec]:
    """Makes the job of one run, by overrides."""

    def make(*overrides: str) -> RunSpec:
        train = val = digits_index("few")
        cfg = load(None, [f"data.train={train}", f"data.val={val}", *FAST, f"run.storage={tmp_path}", *overrides])
        (tmp_path / "run").mkdir(exist_ok=True)
        return RunSpec(cfg, Storage(tmp_path / "run"), str(train), str(val))

    return make


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Lets so many seconds pass."""
    now = 100.0

    def passes(seconds: float) -> None:
        nonlocal now
        now += seconds

    monkeypatch.setattr("pipeline.tracking.ledger.time.perf_counter", lambda: now)
    return passes


def test_phases_nest_without_overlap(clock: Callable[[float], None]) -> None:
    ledger = TimeLedger("start-up", before={"recovery": 7.0})
    clock(1)

    def batches() -> Iterator[int]:
        for seconds in (2, 3, 4):  # that each takes to come
            clock(seconds)
            yield seconds

    for _ in ledger.steps(batches(), lambda seconds: seconds == 2):
        clock(10)
        ledger.start_phase("backward")
        clock(20)
        ledger.start_phase("communication wait")
        clock(0.5)
        ledger.start_phase("optimizer")
        with ledger.phase("checkpoint"):
            clock(5)
            with ledger.phase("logging"):
                clock(0.25)
        clock(1)
    seconds = ledger.seconds()
    assert seconds == {
        "recovery": 7.0,
        "start-up": 3.0,  # the first batch's wait is in it
        "compile": 31.5,  # and what the others do then, who wait for the last one
        "data wait": 7.0,
        "forward": 20.0,
        "backward": 40.0,
        "optimizer": 2.0,
        "communication wait": 1.0,
        "checkpoint": 15.0,
        "logging": 0.75,
    }
    assert summed_up(seconds) == dict.fromkeys(PHASES, 0.0) | {
        **{name: s for name, s in seconds.items() if name in PHASES},
        "compute": 62.0,
    }
    assert goodput(seconds) == pytest.approx(62 / 127.25)


def test_marks_cost_next_to_nothing() -> None:
    """Six a step: less than 0.5% of one of 5 ms, which no network worth training is faster than."""
    ledger, num_marks = TimeLedger("forward"), 20_000
    costs = []
    for _ in range(5):
        began = time.perf_counter()
        for _ in range(num_marks):
            ledger.start_phase("backward")
        costs.append((time.perf_counter() - began) / num_marks)
        ledger.seconds()
    print(f"{1e6 * min(costs):.2f} us a mark")
    assert 6 * min(costs) < 0.005 * 0.005


class SlowEvent:
    """As torch.cuda.Event of a device that is some marks behind."""

    made = 0

    def __init__(self) -> None:
        SlowEvent.made += 1
        self.number = SlowEvent.made

    def query(self) -> bool:
        return self.number < SlowEvent.made - 20

    def synchronize(self) -> None:
        SlowEvent.made += 21

    def elapsed_time(self, later: "SlowEvent") -> float:
        return 1000.0 * (later.number - self.number)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_marks_do_not_gather(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks but the first ask for no seconds, and rank 0 only where it logs."""
    monkeypatch.setattr("pipeline.tracking.ledger._event", SlowEvent)
    ledger = TimeLedger("forward", torch.device(device))
    for _ in ledger.steps(iter(range(1000))):
        for name in ("backward", "communication wait", "optimizer"):
            ledger.start_phase(name)
    assert len(ledger._marks) < 30
    if device == "cuda":
        assert ledger.seconds()["backward"] == 1000


def test_attempts_add_up_to_the_wall_time_since_the_first(spec: Callable[..., RunSpec]) -> None:
    """An attempt that ends, one whose end is never told, and one that goes on from the checkpoint before."""
    five = spec("run.stop_at_step=5", "train.steps=15")
    began = time.time()
    first = fit(five, context())
    stopped = time.time()
    assert sum(first["seconds"].values()) == pytest.approx(first["ended"] - began, rel=0.02, abs=0.2)
    assert first["seconds"]["forward"] < first["seconds"]["backward"]
    assert "recovery" not in first["seconds"]

    asked = dataclasses.replace(context(), marks=(("command", time.time() - 5),))
    second = fit(spec("run.stop_at_step=10", "train.steps=15"), asked)
    gained = second["seconds"]["start-up"] - first["seconds"]["start-up"]
    assert 5 < gained < 5 + time.time() - stopped, "what the command did before its workers is counted"

    run = spec().run
    last = RunManifest.read(run, pytest.fail)
    assert last is not None
    dataclasses.replace(last, open=True).write(run)  # as a killed process leaves it
    time.sleep(2)
    resumed = time.time()
    third = fit(spec("train.steps=15"), context())
    assert third["seconds"]["recovery"] > 2, "the time without training, since the checkpoint"
    whole = sum(third["seconds"].values()) - sum(second["seconds"].values())
    assert whole == pytest.approx(third["ended"] - second["ended"], rel=0.02, abs=0.2)
    assert whole > time.time() - resumed + 2
    assert total(third["seconds"], "start-up") == total(second["seconds"], "start-up")


def test_steps_done_again_are_recovery_and_not_compute(spec: Callable[..., RunSpec]) -> None:
    """Ended by an error at step 15, and taken up again from the checkpoint of step 8."""
    settings = ["train.steps=16", "train.log_every=1", "checkpoint.every=8", "train.eval_every=100"]
    steps = list[StepLogged]()

    def watch(event: Event) -> None:
        if isinstance(event, StepLogged):
            steps.append(event)
            if event.step == 15 and len(steps) == 15:
                raise RuntimeError("the end")

    told = dataclasses.replace(context(), emit=watch)
    with pytest.raises(RuntimeError, match="the end"):
        fit(spec(*settings), told)
    fit(spec(*settings), dataclasses.replace(told, restarted=True))
    assert [event.step for event in steps] == [*range(1, 16), *range(9, 17)]
    eighth, lost, again = (steps[i].seconds for i in (7, 14, 15))
    assert eighth["recovery"] == lost["recovery"] == 0
    assert again["recovery"] > lost["compute"] - eighth["compute"], "seven steps are lost"
    assert eighth["compute"] < again["compute"] < lost["compute"], "and count once"


def test_a_failure_before_any_checkpoint_loses_no_time(spec: Callable[..., RunSpec]) -> None:
    """All since the command is recovery then, its start-up among it."""

    def fall(event: Event) -> None:
        if isinstance(event, StepLogged):
            raise RuntimeError("the end")

    command = (("command", time.time() - 30),)
    with pytest.raises(RuntimeError, match="the end"):
        fit(spec("train.log_every=1"), dataclasses.replace(context(), emit=fall, marks=command))
    done = fit(spec("run.stop_at_step=2"), dataclasses.replace(context(), restarted=True))
    assert done["seconds"]["recovery"] > 30
    assert sum(done["seconds"].values()) == pytest.approx(done["ended"] - command[0][1], rel=0.02)


def waits(rank: int, world_size: int, spec: RunSpec) -> tuple[dict[str, float], float]:
    """Rank 1 is late with each batch. Returns where the time went, and what the loader took."""
    ours, loading = TrainLoader.from_step, 0.0

    def timed(self: TrainLoader, step: int, stop: int) -> Iterator[Batch]:
        nonlocal loading
        batches, began = ours(self, step, stop), time.monotonic()
        for batch in batches:
            if rank == 1:
                time.sleep(0.2)
            loading += time.monotonic() - began
            yield batch
            began = time.monotonic()

    TrainLoader.from_step = timed  # type: ignore[method-assign]  # in this process alone
    return dict(fit(spec, context(rank, world_size)).get("seconds", {})), loading


def test_waiting_for_a_slow_rank_is_communication(spec: Callable[..., RunSpec]) -> None:
    (seconds, loading), _ = run_ranks(waits, 2, spec("train.steps=10", "train.eval_every=100"))
    late = 9 * 0.2  # the first batch is part of the start
    assert seconds["communication wait"] > late / 3, "less where rank 0 is late itself, on a busy machine"
    assert seconds["data wait"] < loading + late / 3, "what rank 1 is late is no wait for data"


@pytest.mark.parametrize("log_every", [5, 10])
def test_nothing_waits_for_the_device_but_logged_steps(
    spec: Callable[..., RunSpec], monkeypatch: pytest.MonkeyPatch, log_every: int
) -> None:
    """`.item()`, `.tolist()` and copies to the host, as they would wait on a GPU, happen at logged and saved steps."""
    calls = Counter[str]()

    def counted(name: str) -> Any:
        real = getattr(torch.Tensor, name)

        def count(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return real(self, *args, **kwargs)

        return count

    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "cpu", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, counted(name))
    said = Predictions(np.zeros(2, int), np.zeros((2, 5), int), np.ones((2, 5)), np.ones(2))
    monkeypatch.setattr("pipeline.training.loop.evaluate", lambda *args, **kwargs: said)
    few = ["train.steps=20", "train.global_batch=4", "checkpoint.every=1000", "train.eval_every=100"]
    fit(spec(f"train.log_every={log_every}", *few, "train.clip_norm=1.0"), context())
    ended = 1  # the last step is saved: what is not finite is looked for once, and its loss is told
    assert calls["tolist"] == 20 // log_every + ended
    assert sum(calls.values()) - calls["tolist"] <= ended


def test_a_profile_names_the_parts_of_its_steps(spec: Callable[..., RunSpec]) -> None:
    done = fit(spec("train.profile=[3,4]", "train.steps=6"), context())
    client = mlflow.MlflowClient(done["mlflow_uri"])
    (artifact,) = client.list_artifacts(done["mlflow_run_id"], "profile")
    assert artifact.path == "profile/steps_3_4.json.gz"
    with gzip.open(client.download_artifacts(done["mlflow_run_id"], artifact.path)) as file:
        events = json.load(file)["traceEvents"]
    ranges = Counter(event["name"] for event in events if event.get("cat") == "user_annotation")
    for part in ("forward", "backward", "optimizer", "data wait"):
        assert ranges[part] == 2, part


def test_a_profile_is_named_by_the_steps_that_it_holds(spec: Callable[..., RunSpec]) -> None:
    """An attempt that ends within the steps asked for, the next one, and one that comes after them."""
    settings = ["train.profile=[3,6]", "train.steps=9"]
    fit(spec(*settings, "run.stop_at_step=4"), context())
    fit(spec(*settings, "run.stop_at_step=7"), context())
    events: list[Event] = []
    done = fit(spec(*settings), context(events=events))
    told = [event.text for event in events if isinstance(event, Warned)]
    assert told == ["train.profile=[3,6]: this attempt trained none of these steps; there is no trace"]
    client = mlflow.MlflowClient(done["mlflow_uri"])
    names = [a.path for a in client.list_artifacts(done["mlflow_run_id"], "profile")]
    assert names == ["profile/steps_3_4.json.gz", "profile/steps_5_6.json.gz"]


def test_a_profile_of_steps_that_end_before_they_begin_is_refused() -> None:
    with pytest.raises(UserError, match=r"train.profile=\[5,4\]: must be \[first,last\] step"):
        load(None, ["data.train=x", "data.val=x", "train.profile=[5,4]"])
