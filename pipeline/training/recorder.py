"""What a run leaves behind: checkpoints, MLflow, progress events, the summary. Rank 0's work.

The loop calls a `Recorder` on every rank; only rank 0's does anything.
"""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from pipeline.config.loading import dump, flatten
from pipeline.data.batch_spec import make_sampler
from pipeline.data.index import Index
from pipeline.data.loading.loader import EvalLoader
from pipeline.events import CheckpointWritten, Evaluated, StepLogged
from pipeline.failures import MLFLOW_END_S, MLFLOW_HANDOVER_S, UPLOAD_S, retry
from pipeline.runs import retention
from pipeline.runs.async_checkpointer import AsyncCheckpointer
from pipeline.runs.checkpoint import Checkpoint, name_of
from pipeline.runs.claim import SupersededError
from pipeline.runs.manifest import RunManifest
from pipeline.runs.spec import RunSpec, WorkerContext
from pipeline.tracking.ledger import TimeLedger, for_mlflow, goodput, images_per_s, speeds, summed_up
from pipeline.tracking.metrics import Predictions
from pipeline.tracking.mlflow_logger import MlflowLogger
from pipeline.tracking.uploads import Uploads
from pipeline.training.attempt import Attempt
from pipeline.training.broken_images import BrokenImages
from pipeline.training.compilation import CompileDecision
from pipeline.training.losses import Interval
from pipeline.training.schedule import Schedule, lr_at
from pipeline.training.state import TrainState
from pipeline.training.stragglers import Stragglers
from pipeline.versions import device_name


class Recorder(AbstractContextManager["Recorder"]):
    """Writes down one attempt of a training.

    Args:
        index: of the training images. manifest: of the training, before this attempt. broken_images: of this attempt.
        resumed: the checkpoint that this attempt goes on from. heartbeat: called in long waits.
        num_steps: of the whole training. precision_reason: why it is the one that cfg says. hosts: of each rank.
    """

    def __init__(
        self,
        spec: RunSpec,
        ctx: WorkerContext,
        index: Index,
        manifest: RunManifest,
        broken_images: BrokenImages,
        resumed: Checkpoint | None,
        ledger: TimeLedger,
        num_steps: int,
        precision_reason: str,
        compilation: CompileDecision,
        hosts: Sequence[str],
        heartbeat: Callable[[], None] = lambda: None,
    ):
        self._spec, self._ctx, self._ledger, self._num_steps, self._heartbeat = spec, ctx, ledger, num_steps, heartbeat
        self._data = {"fingerprint": index.fingerprint, "classes": index.classes}
        self._broken_images, self._compilation = broken_images, compilation
        self._scores = dict(resumed.meta["metrics"]) if resumed else {}
        self._predictions: Predictions | None = None  # of this attempt's last evaluation
        self._first_step = self._logged_step = resumed.step if resumed else 0
        self._first = self._logged = ledger.seconds()  # per phase
        marks = (*ctx.marks, ("state", time.time()))
        self._startup = {name: ended - began for (_, began), (name, ended) in pairwise(marks)}
        if ctx.rank == 0:
            own = resumed.meta if resumed and resumed.meta["training_id"] == manifest.training_id else {}
            sampler = make_sampler(spec.cfg.data, len(index), spec.cfg.train.global_batch, spec.cfg.run.seed)
            self._stragglers = Stragglers(hosts, sampler.shares(ctx.world_size), own.get("stragglers"))
            self._begin(Attempt(spec, ctx, manifest, resumed), resumed, precision_reason)

    def _begin(self, attempt: Attempt, resumed: Checkpoint | None, precision_reason: str) -> None:
        cfg, ctx, run, timeout_s = self._spec.cfg, self._ctx, self._spec.run, self._spec.cfg.cluster.timeout_s
        self._attempt = attempt
        self._mlflow: MlflowLogger  # what writes checkpoints needs it, once it does
        retry(self._spec.checkpoints.make, ctx.warn, timeout_s)
        make = partial(
            AsyncCheckpointer,
            self._spec.checkpoints,
            cfg,
            check=attempt.check,
            keep=lambda: self._mlflow.save_backlog(),
            free=lambda: self._mlflow.staging.drop_oldest(),
            written=self._written,
            scored=self._scored,
            warn=ctx.warn,
            newest=resumed,
        )
        self._checkpointer = retry(make, ctx.warn, timeout_s)
        log_to = partial(MlflowLogger.of_run, cfg.mlflow, run, attempt.training_id, ctx.warn, self._spec.claim)
        self._mlflow = retry(log_to, ctx.warn, timeout_s)
        self._uploads = Uploads(self._mlflow, ctx.warn, min(UPLOAD_S, timeout_s))
        retry(partial(self._mlflow.take_backlog, self._spec.attempt_name(attempt.number)), ctx.warn, timeout_s)
        self._mlflow.start()
        self._mlflow.log_params(flatten(cfg))
        self._mlflow.log_text(dump(cfg), f"config/attempt_{attempt.number}.yaml")
        self._name_broken_images = partial(self._broken_images.log_names, self._mlflow.log_text, attempt.number)
        fingerprint = self._data["fingerprint"]
        compilation = str(self._compilation)
        attempt.announce(self._mlflow, fingerprint, self._num_steps, self._startup, precision_reason, compilation)

    def report_progress(self, step: int) -> None:
        """Tell that `step` steps are done. From the first one on MLflow is talked to: its import takes seconds."""
        self._ctx.progress(step)
        if self._ctx.rank == 0:
            self._mlflow.connect()

    @property
    def wants_save(self) -> bool:
        """Whether a checkpoint that was postponed can be taken now."""
        return self._ctx.rank == 0 and self._checkpointer.wants_save

    def log_step(self, interval: Interval, schedule: Schedule) -> None:
        """Log the last step of an interval; its loss is that of the weights before it."""
        if self._ctx.rank != 0:
            return
        step, seconds = interval.step, interval.seconds
        images = (step - self._logged_step) * self._spec.cfg.train.global_batch
        metrics = {
            "train/loss": interval.losses[-1],
            "train/lr": lr_at(step - 1, self._spec.cfg.optim, schedule),
            "train/epoch": step / schedule.steps_per_epoch,
            **speeds(images, seconds, self._logged),
            "data/bad_images": len(self._broken_images),
            **self._find_stragglers(interval),
        }
        self._logged_step, self._logged = step, seconds
        self._name_broken_images()
        self._mlflow.log_metrics(step, metrics | for_mlflow(seconds))
        self._ctx.emit(StepLogged(step, metrics | {"perf/goodput": goodput(seconds)}, summed_up(seconds)))

    def _find_stragglers(self, interval: Interval) -> dict[str, float]:
        """Tell of ranks that hold the others up; metrics."""
        metrics, line = self._stragglers.add(interval.step, interval.computing, interval.waiting)
        if line:
            self._ctx.warn(line)
            found = [f"{name}: {how}" for name, how in self._stragglers.found.items()]
            self._mlflow.set_tags({"pipeline.stragglers": "; ".join(reversed(found))})
        return metrics

    def log_evaluation(self, state: TrainState, predictions: Predictions) -> None:
        """Log the scores of the weights as they are, and write them into their checkpoint; the best get one anyway."""
        self._scores, self._predictions = (scores := predictions.scores()), predictions
        improved = scores["top1"] > state.best_top1
        state.best_top1 = max(state.best_top1, scores["top1"])
        if self._ctx.rank != 0:
            return
        self._mlflow.log_metrics(state.step, {f"val/{name}": value for name, value in scores.items()})
        self._ctx.emit(Evaluated(state.step, scores))
        if self._checkpointer.has(state.step):
            self._checkpointer.add_scores(state.step, scores)
        elif improved:
            self.save(state, scores, now=True)

    def save(
        self, state: TrainState, scores: dict[str, float] | None = None, *, now: bool, is_scored_later: bool = False
    ) -> None:
        """Have a checkpoint written, with the scores if they are of this very step: see `AsyncCheckpointer.save`."""
        if self._ctx.rank == 0:
            meta = partial(self._meta, state, scores or {})
            self._checkpointer.save(state.step, state.finite_state_dict, meta, now=now, is_scored_later=is_scored_later)

    def _meta(self, state: TrainState, scores: dict[str, float]) -> dict[str, Any]:
        seconds = self._ledger.seconds()
        return {
            **self._data,
            "metrics": scores,
            "num_steps": self._num_steps,
            "best_top1": state.best_top1 if state.best_top1 >= 0 else None,
            "images_per_s": self._images_per_s(state.step, seconds),
            "device": device_name(self._ctx.device),
            "workers": self._ctx.world_size,
            "compile": self._compilation.kept,
            "stragglers": dict(self._stragglers.found),
            "damaged": self._checkpointer.damaged,
            **self._attempt.facts(),
            "mlflow_run_id": self._mlflow.run_id,
            "time": time.time(),
            "seconds": seconds,
        }

    def _images_per_s(self, step: int, seconds: dict[str, float]) -> float | None:
        """Of this attempt."""
        return images_per_s((step - self._first_step) * self._spec.cfg.train.global_batch, seconds, self._first)

    def _written(self, saved: Checkpoint, seconds: float) -> None:
        """A checkpoint is safe; called by the thread that wrote it."""
        if self._spec.cfg.mlflow.checkpoints == "all" and not self._checkpointer.is_scored_later:
            self._uploads.checkpoint(saved)
        metrics = {
            "checkpoint/blocking_s": self._checkpointer.blocking_s,
            "checkpoint/write_s": seconds,
            "checkpoint/postponed": float(self._checkpointer.num_postponed),
            "checkpoint/failed_tries": float(self._checkpointer.num_failed_tries),
        }
        self._mlflow.log_metrics(saved.step, metrics)
        self._ctx.emit(CheckpointWritten(saved.step, str(saved.place)))

    def _scored(self, scored: Checkpoint) -> None:
        """A checkpoint has got its scores; called by the thread that wrote them."""
        if self._spec.cfg.mlflow.checkpoints == "all":
            self._uploads.checkpoint(scored)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """Save what can be saved of an attempt that ends by an error, and tell MLflow of it."""
        if error is None or self._ctx.rank != 0 or getattr(error, "has_ended", False):
            return
        if isinstance(error, SupersededError):  # not its to end
            self._mlflow.abandon()
            return
        self._name_broken_images(is_last=True)
        tag = f"pipeline.attempt_{self._attempt.number}.error"
        self._mlflow.set_tags({tag: f"{type(error).__name__}: {error}"})
        try:
            self._checkpointer.finish(MLFLOW_HANDOVER_S[0])
        except (OSError, RuntimeError) as e:
            self._ctx.warn(str(e))
        self._mlflow.close("FAILED", *MLFLOW_HANDOVER_S, self._heartbeat)

    def finish(self, state: TrainState, val_loader: EvalLoader, *, owes_evaluation: bool) -> dict[str, Any]:
        """Publish what the configuration asks for, end the attempt and return its summary.

        Args:
            val_loader: of the last evaluation's images.
            owes_evaluation: a wish to stop came before that of these weights.

        Raises:
            TimeoutError: the last checkpoint could not be written.
        """
        if self._ctx.rank != 0:
            retention.forget_copies(self._spec.checkpoints, name_of(state.step))
            return {}
        cfg, done = self._spec.cfg, state.step == self._num_steps and not owes_evaluation
        is_last = state.step >= (cfg.run.stop_at_step or self._num_steps) and not owes_evaluation
        self._name_broken_images(is_last=True)
        status = "done" if done else "stopped" if is_last else self._ctx.stop_reason()
        speed = self._images_per_s(state.step, self._ledger.seconds())  # before MLflow is waited for
        with self._ledger.phase("checkpoint"):
            self._checkpointer.finish(cfg.cluster.timeout_s)
            self._heartbeat()
            self._attempt.end()
            top = self._checkpointer.best(self._attempt.training_id)
        newest = self._checkpointer.newest
        assert newest is not None, "an attempt ends with a checkpoint"
        chosen = {"last": newest, "best": top}.get(cfg.mlflow.checkpoints)
        if chosen and status != "resize":
            self._uploads.checkpoint(chosen)
        self._heartbeat()
        if done and cfg.mlflow.log_model:
            self._mlflow.log_model(newest.place, cfg.mlflow.register)
        self._mlflow.log_metrics(state.step, for_mlflow(self._ledger.seconds()))
        if done and cfg.mlflow.report and self._predictions is not None:
            meta = newest.meta | {"seconds": self._ledger.seconds(), "counted": "until this report"}
            meta["mlflow_run_id"] = self._mlflow.run_id
            with self._ledger.phase("logging"):
                self._uploads.report(cfg, self._spec.run, meta, self._predictions, val_loader)
        with self._ledger.phase("logging"):
            limits = MLFLOW_HANDOVER_S if status == "resize" else (MLFLOW_END_S, math.inf)
            waiting = self._mlflow.close("FINISHED" if done else "KILLED", *limits, self._heartbeat)
        if not waiting:
            retention.forget_copies(self._spec.checkpoints)
        elif status != "resize":
            self._ctx.warn(
                f"MLflow is away; {waiting} records wait in {self._mlflow.outbox.path}; "
                f"to send them: pipeline sync {self._spec.run}"
            )
        return {
            "run": self._spec.run.name,
            "run_dir": str(self._spec.run),
            "status": status,
            "step": state.step,
            "num_steps": self._num_steps,
            **{name: self._scores.get(name) for name in ("top1", "top5", "loss")},
            "precision": cfg.train.precision,
            "images_per_s": speed,
            "seconds": self._ledger.seconds(),
            "startup": self._startup,
            "ended": time.time(),
            "checkpoint": str(newest.place),
            "best_checkpoint": top and str(top.place),
            **self._attempt.facts(),
            "mlflow_uri": self._mlflow.target.uri,
            "mlflow_public_url": self._spec.cfg.mlflow.public_url,
            "mlflow_experiment_id": self._mlflow.experiment_id,
            "mlflow_run_id": self._mlflow.run_id,
            "mlflow_waiting": waiting,
        }

    def publish(self, folder: Path) -> None:
        """Have a folder's files logged as artifacts, below its name; on rank 0 alone."""
        self._uploads.folder(folder)
