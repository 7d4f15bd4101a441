"""Whole trainings through `fit`, without Ray: resuming is exact, failures are told, MLflow gets each step once."""

import dataclasses
import itertools
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
import torch.distributed as dist
from commands import differences
from odd_images import as_text, damaged_jpeg, encode, write_odd_folder
from PIL import Image
from ranks import FAST, context, final_state, run_ranks

from pipeline.cluster import ending
from pipeline.config.loading import load
from pipeline.errors import UserError
from pipeline.events import AttemptStarted, BrokenImage, Event, StepLogged, Warned
from pipeline.failures import MLFLOW_END_S, MLFLOW_HANDOVER_S, Interrupted, NonFiniteError, TrainingFailedError
from pipeline.models import pretrained
from pipeline.runs import checkpoint, listing, lock
from pipeline.runs.claim import Claim, SupersededError
from pipeline.runs.manifest import RunManifest
from pipeline.runs.spec import RunSpec
from pipeline.storage import Storage
from pipeline.tracking.metrics import Predictions
from pipeline.tracking.mlflow_logger import MlflowLogger
from pipeline.training import loop, open_run, step
from pipeline.training.evaluation import evaluate
from pipeline.training.loop import NonFiniteLossError, fit
from pipeline.training.state import TrainState

SMALL = [  # for what a CPU may have to emulate
    *("train.global_batch=8", "train.eval_every=1000"),
    *("data.image_size=12", "data.val_resize=12"),
]

RESUMED = ["train.steps=10", "checkpoint.every=4", "train.log_every=4"]  # with 16 of 130 images: 8 steps are an epoch


@pytest.fixture
def spec(digits_index: Callable[[str], Path], tmp_path: Path) -> Callable[..., RunSpec]:
    """Makes a job by run name and overrides."""

    def make(name: str, *overrides: str) -> RunSpec:
        train = val = digits_index("few")
        cfg = load(None, [f"data.train={train}", f"data.val={val}", *FAST, f"run.storage={tmp_path}", *overrides])
        (tmp_path / name).mkdir(exist_ok=True)
        return RunSpec(cfg, Storage(tmp_path / name), str(train), str(val))

    return make


def train_and_resume(rank: int, world_size: int, whole: RunSpec, parts: RunSpec) -> None:
    """10 steps; and 5 steps, stop, resume to 10."""
    fit(whole, context(rank, world_size))
    _barrier()
    stopped = dataclasses.replace(parts, cfg=dataclasses.replace(parts.cfg, run=_stop_at(parts, 5)))
    summary = fit(stopped, context(rank, world_size))
    assert rank > 0 or (summary["step"], summary["status"]) == (5, "stopped")
    _barrier()
    events: list[Event] = []
    fit(parts, context(rank, world_size, events))
    assert [event.step for event in events if isinstance(event, AttemptStarted)] == ([] if rank > 0 else [5])
    _barrier()


def _stop_at(spec: RunSpec, step: int) -> Any:
    return dataclasses.replace(spec.cfg.run, stop_at_step=step)


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_resume_mid_epoch_is_bitwise_one_worker(spec: Callable[..., RunSpec], precision: str) -> None:
    # Not smaller: the weight gradient of a bf16 convolution of a single pixel differs from call to call (oneDNN).
    small = [*SMALL, "data.image_size=32", "data.val_resize=32"] if precision == "bf16" else []
    whole, parts = (spec(name, f"train.precision={precision}", *RESUMED, *small) for name in ("whole", "parts"))
    torch.set_num_threads(1)
    train_and_resume(0, 1, whole, parts)
    assert final_state(whole)["step"] == 10
    assert differences(final_state(whole), final_state(parts)) == []


def test_resume_mid_epoch_is_bitwise_two_workers(spec: Callable[..., RunSpec]) -> None:
    whole, parts = (spec(name, "cluster.workers=2", "train.micro_batch=5", *RESUMED) for name in ("whole", "parts"))
    run_ranks(train_and_resume, 2, whole, parts)
    assert final_state(whole)["step"] == 10
    assert differences(final_state(whole), final_state(parts)) == []


@pytest.mark.e2e
@pytest.mark.long
def test_resume_mid_epoch_is_bitwise_three_workers(spec: Callable[..., RunSpec]) -> None:
    """With three, the order of a ring's sums depends on how DDP lays out its buckets."""
    whole, parts = (spec(name, "cluster.workers=3", *RESUMED) for name in ("whole", "parts"))
    run_ranks(train_and_resume, 3, whole, parts)
    assert final_state(whole)["step"] == 10
    assert differences(final_state(whole), final_state(parts)) == []


def test_resume_is_bitwise_with_adamw_and_fp16(spec: Callable[..., RunSpec]) -> None:
    settings = ["optim.name=adamw", "optim.lr=0.001", "train.precision=fp16", "train.clip_norm=1.0"]
    whole, parts = (spec(name, *settings, *RESUMED, *SMALL) for name in ("whole", "parts"))
    train_and_resume(0, 1, whole, parts)
    assert final_state(whole)["scaler"]
    assert differences(final_state(whole), final_state(parts)) == []


def test_mlflow_has_one_run_with_each_step_once(spec: Callable[..., RunSpec], tmp_path: Path) -> None:
    """Also where steps were trained twice: the second attempt begins at an older checkpoint."""
    settings = ["mlflow.log_model=true", "mlflow.checkpoints=last", "train.eval_every=100"]
    settings += ["train.steps=8", "train.log_every=2", "checkpoint.every=4"]
    first = spec("run", *settings)
    stopped = dataclasses.replace(first, cfg=dataclasses.replace(first.cfg, run=_stop_at(first, 6)))
    one = fit(stopped, context())
    newest = checkpoint.newest_valid(first.checkpoints, pytest.fail)
    assert newest is not None
    (newest.path / "state.pt").write_bytes(b"damaged")  # back to step 4
    events: list[Event] = []
    two = fit(first, context(events=events))
    assert [e.text for e in events if isinstance(e, Warned) and "state.pt is damaged" in e.text]
    assert next(e for e in events if isinstance(e, AttemptStarted)).step == 4

    assert one["mlflow_run_id"] == two["mlflow_run_id"]
    client = mlflow.MlflowClient(two["mlflow_uri"])
    assert len(client.search_runs([two["mlflow_experiment_id"]])) == 1
    run = client.get_run(two["mlflow_run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.params["model.depth"] == "18"
    assert run.data.tags["pipeline.attempts"] == "2"
    for key in ("train/loss", "train/lr", "perf/images_per_s"):
        history = client.get_metric_history(run.info.run_id, key)
        assert sorted(m.step for m in history) == [2, 4, 6, 8], key
    assert {m.step for m in client.get_metric_history(run.info.run_id, "val/top1")} == {8}
    artifacts = {a.path for a in client.list_artifacts(run.info.run_id, "checkpoints/step_00000008")}
    assert {Path(a).name for a in artifacts} == {"state.pt", "config.yaml", "meta.json"}
    assert {a.path for a in client.list_artifacts(run.info.run_id, "config")} == {
        "config/attempt_1.yaml",
        "config/attempt_2.yaml",
    }
    assert_model_predicts_like_checkpoint(client, two)


def assert_model_predicts_like_checkpoint(client: Any, summary: dict[str, Any]) -> None:
    mlflow.set_tracking_uri(summary["mlflow_uri"])
    (logged,) = client.get_run(summary["mlflow_run_id"]).outputs.model_outputs
    served = mlflow.pyfunc.load_model(f"models:/{logged.model_id}")
    model, _, classes = pretrained.load_model(Storage(summary["checkpoint"]))
    pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    with torch.inference_mode():
        expected = model(torch.from_numpy(pixels).permute(0, 3, 1, 2)).softmax(1).topk(5)
    answers = served.predict(pd.DataFrame({"image": [as_text(encode(Image.fromarray(one), "PNG")) for one in pixels]}))
    assert answers["classes"].tolist() == [[classes[k] for k in row] for row in expected.indices.tolist()]
    np.testing.assert_allclose(answers["probabilities"].tolist(), expected.values, atol=1e-4)


def test_a_non_finite_loss_names_step_rate_and_samples(spec: Callable[..., RunSpec]) -> None:
    broken = spec("nan", "optim.lr=1.0e+6", "optim.warmup_epochs=0", "train.log_every=3", "checkpoint.every=1000")
    with pytest.raises(
        NonFiniteLossError, match=r"the loss of step (\d+) is (nan|inf).* rate \d+\).* batch: \d+( \d+){15}$"
    ):
        fit(broken, context())
    assert broken.checkpoints.names() == []


@pytest.mark.parametrize("where", ["fc.weight", "layer1.0.bn1.running_var", "ema", "momentum"])
def test_a_state_that_is_no_number_is_not_saved(
    spec: Callable[..., RunSpec], monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """By the last update: the loss does not tell of it yet, and each resume would begin with it."""
    step_of = step.train_step

    def breaks(state: TrainState, *args: Any, **options: Any) -> torch.Tensor:
        loss = step_of(state, *args, **options)
        if state.step == 4:
            assert state.ema is not None
            tensors = {
                "ema": state.ema.fc.bias,
                "momentum": state.optimizer.state[state.model.fc.bias]["momentum_buffer"],
            }
            tensors |= state.model.state_dict()
            tensors[where].data.view(-1)[3] = torch.nan if where == "ema" else torch.inf
        return loss

    settings = ["train.steps=6", "checkpoint.every=4", "train.log_every=1"]
    fit(spec("run", *settings, "run.stop_at_step=2"), context())
    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", breaks)
        with pytest.raises(NonFiniteError, match=r"^(model|ema|optimizer)\..* is not finite after step 4, which"):
            fit(spec("run", *settings), context())
    assert spec("run").checkpoints.names() == ["step_00000002"]
    assert fit(spec("run", *settings), context())["status"] == "done"


def test_large_values_are_finite() -> None:
    """Their squares are not."""
    state = TrainState.create(load(None, ["data.train=x", "data.val=x", "model.depth=18"]), 2, torch.device("cpu"))
    with torch.no_grad():
        state.model.fc.weight[0, 0] = 1e30
    state.check_finite()
    with torch.no_grad():
        state.model.fc.weight[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"model\.fc\.weight is not finite"):
        state.check_finite()


@pytest.mark.parametrize("content", [None, "{", '{"attempts": "many"}'])
def test_a_lost_run_json_is_made_up_from_the_newest_checkpoint(
    spec: Callable[..., RunSpec], content: str | None
) -> None:
    one = fit(spec("run", "run.stop_at_step=2"), context())
    path = Path(one["run_dir"]) / "run.json"
    path.unlink()
    if content is not None:
        path.write_text(content)
    events: list[Event] = []
    two = fit(spec("run", "run.stop_at_step=3"), context(events=events))
    assert [(e.attempt, e.step) for e in events if isinstance(e, AttemptStarted)] == [(2, 2)]
    assert two["mlflow_run_id"] == one["mlflow_run_id"]
    assert any("run.json is damaged" in getattr(e, "text", "") for e in events) == (content is not None)


def test_a_checkpoint_of_another_training_is_not_taken(spec: Callable[..., RunSpec], tmp_path: Path) -> None:
    fit(spec("run", "run.stop_at_step=2"), context())
    fit(spec("other", "run.stop_at_step=4"), context())
    shutil.copytree(tmp_path / "other/checkpoints/step_00000004", tmp_path / "run/checkpoints/step_00000004")
    events: list[Event] = []
    assert fit(spec("run", "run.stop_at_step=3"), context(events=events))["step"] == 3
    assert any("step_00000004: belongs to another training" in getattr(e, "text", "") for e in events)


def test_the_later_of_two_drivers_wins(spec: Callable[..., RunSpec]) -> None:
    """On machines that share no lock: the earlier one stops before it writes again, and ends nothing of the run."""
    run = spec("run").run
    RunManifest().write(run)
    one = dataclasses.replace(spec("run", "checkpoint.every=5"), claim=Claim.take(run))

    def watch(event: Event) -> None:
        if isinstance(event, StepLogged) and event.step == 10:
            Claim.take(run)

    with pytest.raises(SupersededError, match=r"another driver has begun to train .*run; this one ends"):
        fit(one, dataclasses.replace(context(), emit=watch))
    assert [name for name in one.checkpoints.names() if name > "step_00000010"] == []
    left = RunManifest.read(run, pytest.fail)
    assert left is not None
    assert left.open
    with pytest.raises(SupersededError):
        fit(one, context())
    assert RunManifest.read(run, pytest.fail) == left


def test_an_earlier_attempt_of_the_same_driver_writes_no_more(spec: Callable[..., RunSpec]) -> None:
    one = spec("run", "checkpoint.every=5")

    def watch(event: Event) -> None:
        if isinstance(event, StepLogged) and event.step == 10:
            now = RunManifest.read(one.run, pytest.fail)
            assert now is not None
            now.begin(0).write(one.run)

    with pytest.raises(RuntimeError, match=r"attempt 2 of .*run has begun; attempt 1 ends"):
        fit(one, dataclasses.replace(context(), emit=watch))


def mlflow_status(spec: RunSpec) -> list[str]:
    client = mlflow.MlflowClient(f"sqlite:///{spec.cfg.run.storage}/mlflow.db")
    experiments = [one.experiment_id for one in client.search_experiments()]
    return [run.info.status for run in client.search_runs(experiments)]


def test_mlflow_is_told_of_an_attempt_that_ends_before_its_first_step(
    spec: Callable[..., RunSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("out of luck")

    monkeypatch.setattr(loop, "wrap_model", fails)
    with pytest.raises(RuntimeError, match="out of luck"):
        fit(spec("run"), context())
    assert mlflow_status(spec("run")) == ["FAILED"]


@pytest.mark.parametrize(
    ("error", "is_open", "status"),
    [
        (TrainingFailedError("too many"), True, ["FAILED"]),
        (Interrupted(), True, ["KILLED"]),  # it waits for room, after its workers were killed
        (Interrupted(), False, ["KILLED"]),
    ],
)
def test_mlflow_is_told_of_a_run_that_ends_between_attempts(
    spec: Callable[..., RunSpec], error: TrainingFailedError | Interrupted, is_open: bool, status: list[str]
) -> None:
    run = spec("run").run
    ending.tell_end(spec("run"), 0, error, pytest.fail)
    RunManifest().write(run)
    ending.tell_end(spec("run"), 0, error, pytest.fail)  # no attempt has begun: there is nothing to end
    assert "mlflow.db" not in run.parent.names()
    fit(spec("run", "run.stop_at_step=2"), context())
    now = RunManifest.read(run, pytest.fail)
    assert now is not None
    dataclasses.replace(now, open=is_open).write(run)
    if is_open:  # as killed workers leave it
        client = mlflow.MlflowClient(f"sqlite:///{run.parent}/mlflow.db")
        (experiment,) = [one for one in client.search_experiments() if one.name == "pipeline"]
        (there,) = client.search_runs([experiment.experiment_id])
        client.update_run(there.info.run_id, status="RUNNING")
    ending.tell_end(spec("run"), 1, error, pytest.fail)  # the attempt is an earlier command's
    assert RunManifest.read(run, pytest.fail) == dataclasses.replace(now, open=is_open, place=str(run))
    ending.tell_end(spec("run"), 0, error, pytest.fail)
    assert mlflow_status(spec("run")) == status
    ended = RunManifest.read(run, pytest.fail)
    assert ended is not None
    assert (ended.unended(), ended.failure) == ((), "too many" if status == ["FAILED"] else "")
    (listed_run,) = listing.listed(run.parent)
    assert listed_run.state == ("failed" if status == ["FAILED"] else "stopped")


@pytest.mark.parametrize("unseen", ["drivers", "run.json", "checkpoints", "checkpoints/step_00000004"])
def test_a_node_that_sees_the_run_late_begins_no_new_training(
    spec: Callable[..., RunSpec], unseen: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a network file system shows it: an absent file stays absent for up to a minute."""
    run = spec("run").run
    RunManifest().write(run)
    one = dataclasses.replace(spec("run", "run.stop_at_step=4"), claim=Claim.take(run))
    fit(one, context())
    away, pauses = tmp_path / "away", list[float]()
    (tmp_path / "run" / unseen).rename(away)

    def appears(pause: float) -> None:
        pauses.append(pause)
        if len(pauses) == 2:
            away.rename(tmp_path / "run" / unseen)

    events = list[Event]()
    one = dataclasses.replace(one, saved_step=4, cfg=spec("run", "run.stop_at_step=6").cfg)
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.failures.time.sleep", appears)
        fit(one, context(events=events))
    (start,) = [event for event in events if isinstance(event, AttemptStarted)]
    assert (start.attempt, start.step) == (2, 4)
    assert "mount the same run.storage" in next(event.text for event in events if isinstance(event, Warned))


def test_a_run_that_a_node_never_sees_is_a_failure(
    spec: Callable[..., RunSpec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = spec("run").run
    RunManifest().write(run)
    one = dataclasses.replace(spec("run", "run.stop_at_step=2", "cluster.timeout_s=20"), claim=Claim.take(run))
    fit(one, context())
    before = (tmp_path / "run/run.json").read_bytes()
    (tmp_path / "run/checkpoints").rename(tmp_path / "away")
    clock = itertools.count(0.0, 5.0)
    monkeypatch.setattr("pipeline.failures.time", SimpleNamespace(sleep=lambda _: None, monotonic=lambda: next(clock)))
    with pytest.raises(OSError, match=r"mount the same run\.storage"):
        fit(dataclasses.replace(one, saved_step=2), context())
    assert (tmp_path / "run/run.json").read_bytes() == before
    assert not (tmp_path / "run/checkpoints").exists()


@pytest.mark.parametrize(("why", "limited"), [("resize", True), ("interrupted", False)])
def test_a_node_that_is_drained_waits_for_mlflow_for_a_limited_time(
    spec: Callable[..., RunSpec], why: Any, limited: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also for one that answers, but has a long backlog to take: the next attempt sends the rest."""
    closed, close = list[tuple[Any, ...]](), MlflowLogger.close

    def watched(self: MlflowLogger, *args: Any) -> int:
        closed.append(args[:3])
        return close(self, *args)

    monkeypatch.setattr(MlflowLogger, "close", watched)
    assert fit(spec("run"), dataclasses.replace(context(), stop_reason=lambda: why))["status"] == why
    assert closed == [("KILLED", *(MLFLOW_HANDOVER_S if limited else (MLFLOW_END_S, math.inf)))]
    assert math.isfinite(MLFLOW_HANDOVER_S[1])


def test_a_finished_run_trains_no_more(spec: Callable[..., RunSpec]) -> None:
    done = spec("run", "train.steps=4")
    first = fit(done, context())
    again = fit(done, context())
    assert (again["step"], again["status"], again["top1"]) == (4, "done", first["top1"])
    assert again["images_per_s"] is None


def test_stop_request_saves_and_ends(spec: Callable[..., RunSpec]) -> None:
    asked = dataclasses.replace(context(), stop_reason=lambda: "interrupted")
    summary = fit(spec("run"), asked)
    assert (summary["status"], summary["step"]) == ("interrupted", 1)
    assert Path(summary["checkpoint"]).name == "step_00000001"


def test_training_runs_on_the_rest_of_an_odd_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a folder as a user has it, by way of `runs.prepare`: what is left out is named, a broken image too."""
    images = tmp_path / "images"
    _, unusable = write_odd_folder(images)
    (images / "odd" / "damaged.jpg").write_bytes(damaged_jpeg())
    small = [s for s in FAST if not s.startswith("train.")]
    settings = ["train.global_batch=8", "train.epochs=3", "train.log_every=1", f"run.storage={tmp_path}/runs"]
    cfg = load(None, [f"data.train={images}", f"data.val={images}", *small, *settings, "run.name=odd"])
    monkeypatch.setattr(lock, "LOCK_S", 0.5)
    events, left_out = list[Event](), list[str]()
    refused = pytest.raises(UserError, match=r"run.name=odd: is being trained by process \d+")
    with open_run.open_run(cfg, left_out.append) as spec, refused, open_run.open_run(cfg, print):
        pass
    assert len(left_out) == 2 * len(unusable)  # of train and of val
    for path, reason in unusable.items():
        assert any(str(images / path) in text and reason in text for text in left_out)
    summary = fit(spec, context(events=events))
    assert (summary["status"], summary["step"]) == ("done", 6)
    named = [e.path for e in events if isinstance(e, BrokenImage)]
    assert named
    assert set(named) == {str(images / "odd/damaged.jpg")}


def test_the_best_checkpoint_is_uploaded_from_an_object_store(
    digits_index: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This machine keeps a copy of the newest one alone."""
    said = iter([True, False, False])

    def judged(model: Any, loader: Any, **options: Any) -> Predictions:
        """The first evaluation is the best."""
        found = evaluate(model, loader, **options)
        right = loader.index.labels.astype(np.int64)
        found.best[:, 0] = right if next(said) else (right + 1) % 10
        return found

    monkeypatch.setattr(loop, "evaluate", judged)
    val, uri = digits_index("few"), f"sqlite:///{tmp_path}/mlflow.db"
    words = ["train.steps=6", "train.global_batch=65", "mlflow.checkpoints=best", f"mlflow.uri={uri}"]
    cfg = load(None, [*FAST, f"data.train={val}", f"data.val={val}", "run.storage=memory://best", *words])
    run = Storage("memory://best") / tmp_path.name
    events: list[Event] = []
    summary = fit(RunSpec(cfg, run, str(val), str(val)), context(events=events))
    assert not [event.text for event in events if isinstance(event, Warned)]
    client = mlflow.MlflowClient(uri)
    (best,) = client.list_artifacts(summary["mlflow_run_id"], "checkpoints")
    assert best.path == "checkpoints/step_00000002"
    assert len(client.list_artifacts(summary["mlflow_run_id"], best.path)) == 3
    for folder in (run, run / "checkpoints"):
        shutil.rmtree(folder.local_dir)
    # The next command is given on another node, and all that is left to do is the model.
    logging = load(None, [*FAST, f"data.train={val}", f"data.val={val}", *words, "mlflow.log_model=true"])
    fit(RunSpec(logging, run, str(val), str(val)), context(events=events))
    assert not [event.text for event in events if isinstance(event, Warned)]
    assert len(client.get_run(summary["mlflow_run_id"]).outputs.model_outputs) == 1
    for folder in (run, run / "checkpoints"):
        shutil.rmtree(folder.local_dir)
