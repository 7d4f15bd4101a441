"""What a run leaves behind: checkpoints, MLflow, progress events, the summary. Rank 0's work.

The loop calls a `Recorder` on every rank; only rank 0's does anything.
"""

import math
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from pipeline.config.loading import dump, flatten
from pipeline.data.index import Index
from pipeline.data.loading.loader import EvalLoader
from pipeline.failures import MLFLOW_END_S, MLFLOW_HANDOVER_S, UPLOAD_S, retry
from pipeline.runs import retention
from pipeline.runs.async_checkpointer import AsyncCheckpointer
from pipeline.runs.checkpoint import Checkpoint, name_of
from pipeline.runs.claim import SupersededError
from pipeline.runs.manifest import RunManifest
from pipeline.runs.spec import RunSpec, WorkerContext
from pipeline.tracking.ledger import STEP, TimeLedger, for_mlflow, goodput, summed_up, total
from pipeline.tracking.metrics import Predictions
from pipeline.tracking.mlflow_logger import MlflowLogger
from pipeline.tracking.report.page import Facts, find_mistakes
from pipeline.tracking.uploads import Uploads
from pipeline.training.state import TrainState
from pipeline.versions import device_name


class Recorder:
    """Writes down one attempt of a training.

    Args:
        index: of the training images. identity: of the training, before this attempt.
        resumed: the checkpoint that this attempt goes on from.
        num_steps: of the whole training. precision: why it is the one that cfg says. heartbeat: called in long waits.
    """

    def __init__(
        self,
        job: RunSpec,
        ctx: WorkerContext,
        index: Index,
        identity: RunManifest,
        resumed: Checkpoint | None,
        ledger: TimeLedger,
        num_steps: int,
        precision: str,
        heartbeat: Callable[[], None] = lambda: None,
    ):
        self._job, self._ctx, self._ledger, self._num_steps, self._heartbeat = job, ctx, ledger, num_steps, heartbeat
        self._data = {"fingerprint": index.fingerprint, "classes": index.classes}
        self.num_bad = 0  # broken images that this rank has met
        self._scores = dict(resumed.meta["metrics"]) if resumed else {}
        self._said: Predictions | None = None  # of this attempt's last evaluation
        self._first_step = self._logged_step = resumed.step if resumed else 0
        self._first = self._logged = ledger.seconds()  # per phase
        marks = (*ctx.marks, ("state", time.time()))
        self._startup = {name: ended - began for (_, began), (name, ended) in pairwise(marks)}
        if ctx.rank == 0:
            self._identity = identity
            self._begin(resumed, precision)

    def _begin(self, resumed: Checkpoint | None, precision: str) -> None:
        cfg, ctx, run, timeout_s = self._job.cfg, self._ctx, self._job.run, self._job.cfg.cluster.timeout_s
        failures = ctx.failures or self._identity.unended()
        self._replace_identity(self._identity.begin(len(failures), cfg.train.precision))
        retry(self._job.checkpoints.make, ctx.warn, timeout_s)
        self._saver = AsyncCheckpointer(
            self._job.checkpoints,
            cfg,
            check=lambda: self._identity.check(self._job.run, self._job.claim),
            keep=lambda: self._tracker.keep(),
            free=lambda: self._tracker.give_way(),
            written=self._written,
            scored=self._scored,
            report=ctx.warn,
            newest=resumed,
        )
        make = partial(MlflowLogger.of_run, cfg.mlflow, run, self._identity.training_id, ctx.warn, self._job.claim)
        self._tracker = retry(make, ctx.warn, timeout_s)
        self._uploads = Uploads(self._tracker, ctx.warn, min(UPLOAD_S, timeout_s))
        retry(partial(self._tracker.adopt, self._job.attempt_name(self._identity.attempts)), ctx.warn, timeout_s)
        self._tracker.start()
        self._tracker.params(flatten(cfg))
        attempt = self._identity.attempts
        self._tracker.text(dump(cfg), f"config/attempt_{attempt}.yaml")
        tags = self._identity.tags(failures, self._first_step, ctx.world_size)
        self._tracker.tags({**tags, "pipeline.data_fingerprint": self._data["fingerprint"]})
        story = self._identity.story(failures, self._first_step, ctx.world_size)
        self._tracker.metrics(attempt, {f"attempt/{name}": value for name, value in story.items()})  # step: attempt
        where = {"world_size": ctx.world_size, "num_threads": ctx.num_threads, "device": ctx.device.type}
        where |= {"precision": cfg.train.precision, "precision_reason": precision}
        steps = {"step": self._first_step, "num_steps": self._num_steps, "global_batch": cfg.train.global_batch}
        told: dict[str, float] = {k: story[k] for k in ("lost_steps", "recovery_s") if k in story}
        start = {"kind": "start", "attempt": attempt, **steps, "resumed_from": resumed and str(resumed.place)}
        ctx.emit({**start, "startup": self._startup, **where, **told, "failures": self._identity.failures})

    def _replace_identity(self, new: RunManifest) -> None:
        replace = partial(self._identity.replaced, new, self._job.run, self._job.claim)
        self._identity = retry(replace, self._ctx.warn, self._job.cfg.cluster.timeout_s)

    def progress(self, step: int) -> None:
        """Tell that `step` steps are done. From the first one on MLflow is talked to: its import takes seconds."""
        self._ctx.progress(step)
        if self._ctx.rank == 0:
            self._tracker.connect()

    @property
    def wants_save(self) -> bool:
        """Whether a checkpoint that was postponed can be taken now."""
        return self._ctx.rank == 0 and self._saver.wants_save

    def step(self, step: int, loss: float, lr: float, epoch: float, num_bad: int) -> None:
        """Log one step: `loss` is the mean over its global batch, of the weights before it."""
        if self._ctx.rank != 0:
            return
        seconds, before = self._ledger.seconds(), self._logged
        step_s = total(seconds, *STEP) - total(before, *STEP)
        images = (step - self._logged_step) * self._job.cfg.train.global_batch
        metrics = {
            "train/loss": loss,
            "train/lr": lr,
            "train/epoch": epoch,
            "perf/images_per_s": images / step_s,
            "perf/data_wait_share": (total(seconds, "data wait") - total(before, "data wait")) / step_s,
            "data/bad_images": num_bad,
        }
        self._logged_step, self._logged = step, seconds
        self._tracker.metrics(step, metrics | for_mlflow(seconds))
        told = {"seconds": summed_up(seconds), "perf/goodput": goodput(seconds)}
        self._ctx.emit({"kind": "step", "step": step, **told, **metrics})

    def evaluation(self, state: TrainState, said: Predictions) -> None:
        """Log the scores of the weights as they are, and write them into their checkpoint; the best get one anyway."""
        self._scores, self._said = (scores := said.scores()), said
        improved = scores["top1"] > state.best_top1
        state.best_top1 = max(state.best_top1, scores["top1"])
        if self._ctx.rank != 0:
            return
        self._tracker.metrics(state.step, {f"val/{name}": value for name, value in scores.items()})
        self._ctx.emit({"kind": "evaluation", "step": state.step, **scores})
        if self._saver.has(state.step):
            self._saver.add_scores(state.step, scores)
        elif improved:
            self.save(state, scores, now=True)

    def save(
        self, state: TrainState, scores: dict[str, float] | None = None, *, now: bool, is_scored_later: bool = False
    ) -> None:
        """Have a checkpoint written, with the scores if they are of this very step: see `AsyncCheckpointer.save`."""
        if self._ctx.rank == 0:
            meta = partial(self._meta, state, scores or {})
            self._saver.save(state.step, state.finite_state_dict, meta, now=now, is_scored_later=is_scored_later)

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
            **self._identity.facts(),
            "mlflow_run_id": self._tracker.run_id,
            "time": time.time(),
            "seconds": seconds,
        }

    def _written(self, saved: Checkpoint, seconds: float) -> None:
        """A checkpoint is safe; called by the thread that wrote it."""
        if self._job.cfg.mlflow.checkpoints == "all" and not self._saver.is_scored_later:
            self._uploads.checkpoint(saved)
        metrics = {
            "checkpoint/blocking_s": self._saver.blocking_s,
            "checkpoint/write_s": seconds,
            "checkpoint/postponed": float(self._saver.num_postponed),
            "checkpoint/failed_tries": float(self._saver.num_failed_tries),
        }
        self._tracker.metrics(saved.step, metrics)
        self._ctx.emit({"kind": "checkpoint", "step": saved.step, "path": str(saved.place)})

    def _scored(self, scored: Checkpoint) -> None:
        """A checkpoint has got its scores; called by the thread that wrote them."""
        if self._job.cfg.mlflow.checkpoints == "all":
            self._uploads.checkpoint(scored)

    def bad_image(self, path: str, reason: str) -> None:
        """Name a broken image that this rank has met."""
        self.num_bad += 1
        self._ctx.warn(f"{path} is broken, a uniform image takes its place: {reason}")

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """Save what can be saved of an attempt that ends by an error, and tell MLflow of it."""
        if error is None or self._ctx.rank != 0:
            return
        if isinstance(error, SupersededError):  # not its to end
            self._tracker.abandon()
            return
        self._tracker.tags(
            {f"pipeline.attempt_{self._identity.attempts}.error": f"{type(error).__name__}: {error}"[:500]}
        )
        try:
            self._saver.finish(MLFLOW_HANDOVER_S[0])
        except (OSError, RuntimeError) as e:
            self._ctx.warn(str(e))
        self._tracker.close("FAILED", *MLFLOW_HANDOVER_S, self._heartbeat)

    def finished(self, state: TrainState, val_loader: EvalLoader, *, owes_evaluation: bool) -> dict[str, Any]:
        """Publish what the configuration asks for, end the attempt and return its summary.

        Args:
            val_loader: of the last evaluation's images.
            owes_evaluation: a wish to stop came before that of these weights.

        Raises:
            TimeoutError: the last checkpoint could not be written.
        """
        if self._ctx.rank != 0:
            retention.forget_copies(self._job.checkpoints, name_of(state.step))
            return {}
        cfg, done = self._job.cfg, state.step == self._num_steps and not owes_evaluation
        asked = state.step >= (cfg.run.stop_at_step or self._num_steps) and not owes_evaluation
        status = "done" if done else "stopped" if asked else self._ctx.stop_reason()
        speed = self._images_per_s(state.step, self._ledger.seconds())  # before MLflow is waited for
        with self._ledger.phase("checkpoint"):
            self._saver.finish(cfg.cluster.timeout_s)
            self._heartbeat()
            self._replace_identity(self._identity.end())
            top = retention.best_of(retention.own(self._job.checkpoints, self._identity.training_id))
        newest = self._saver.newest
        assert newest is not None, "an attempt ends with a checkpoint"
        chosen = {"last": newest, "best": top}.get(cfg.mlflow.checkpoints)
        if chosen and status != "resize":
            self._uploads.checkpoint(chosen)
        self._heartbeat()
        if done and cfg.mlflow.log_model:
            self._tracker.model(newest.place, cfg.mlflow.register)
        self._tracker.metrics(state.step, for_mlflow(self._ledger.seconds()))
        if done and cfg.mlflow.report and self._said is not None:
            with self._ledger.phase("logging"):
                self._report(newest.meta, self._said, val_loader)
        with self._ledger.phase("logging"):
            limits = MLFLOW_HANDOVER_S if status == "resize" else (MLFLOW_END_S, math.inf)
            waiting = self._tracker.close("FINISHED" if done else "KILLED", *limits, self._heartbeat)
        if not waiting:
            retention.forget_copies(self._job.checkpoints)
        elif status != "resize":
            self._ctx.warn(
                f"MLflow is away; {waiting} records wait in {self._tracker.spool}; "
                f"to send them: pipeline sync {self._job.run}"
            )
        return {
            "run": self._job.run.name,
            "run_dir": str(self._job.run),
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
            **self._identity.facts(),
            "mlflow_uri": self._tracker.uri,
            "mlflow_experiment_id": self._tracker.experiment_id,
            "mlflow_run_id": self._tracker.run_id,
            "mlflow_waiting": waiting,
        }

    def _images_per_s(self, step: int, seconds: dict[str, float]) -> float | None:
        images = (step - self._first_step) * self._job.cfg.train.global_batch  # of this attempt
        return images / (total(seconds, *STEP) - total(self._first, *STEP)) if images else None

    def _report(self, meta: dict[str, Any], said: Predictions, val_loader: EvalLoader) -> None:
        """Lay aside all that the report takes, so that MLflow may be away: the thread that logs it makes it."""
        told = {"seconds": self._ledger.seconds(), "counted": "until this report"}
        meta = {**meta, **told, "mlflow_run_id": self._tracker.run_id}
        cfg, run = self._job.cfg, self._job.run
        try:
            self._tracker.report(Facts(run.name, cfg.data.val, meta, cfg, said, find_mistakes(said, val_loader)))
        except Exception as e:  # a full disk, images that cannot be read again, ...: the training is done all the same
            self._ctx.warn(f"no report is made ({type(e).__name__}: {e}); try again: pipeline report {run}")

    def publish(self, folder: Path) -> None:
        """Have a folder's files logged as artifacts, below its name; on rank 0 alone."""
        self._uploads.folder(folder)
