"""What a run leaves behind: checkpoints, MLflow, progress events, the summary. Rank 0's work.

The loop calls a `Recorder` on every rank; only rank 0's does anything.
"""

import json
import uuid
from pathlib import Path
from typing import Any

from pipeline import checkpoint
from pipeline.checkpoint import Checkpoint
from pipeline.config import ConfigError
from pipeline.data.index import Index
from pipeline.job import Context, Job
from pipeline.perf import Ledger
from pipeline.settings import dump, flatten
from pipeline.state import TrainState
from pipeline.tracking import Tracker, tracking_uri

# How long a session's end goes on trying an MLflow that fails; what is left waits in the spool.
PATIENCE_S = 30.0
PATIENCE_BEFORE_RESTART_S = 5.0
STEP_PHASES = ("compute", "data wait", "logging")


class Recorder:
    """Writes down one session of a training.

    Args:
        index: of the training images.
        resumed: the checkpoint that this session goes on from.
        num_steps: of the whole training.
    """

    def __init__(
        self, job: Job, ctx: Context, index: Index, resumed: Checkpoint | None, ledger: Ledger, num_steps: int
    ):
        self._job, self._ctx, self._ledger, self._num_steps = job, ctx, ledger, num_steps
        self._data = {"fingerprint": index.fingerprint, "classes": index.classes}
        self.num_bad = 0  # broken images that this rank has met
        self._newest, self._scores = resumed, dict(resumed.meta["metrics"]) if resumed else {}
        self._first_step = self._logged_step = resumed.step if resumed else 0
        self._logged_s = 0.0
        if ctx.rank == 0:
            self._begin()

    def _begin(self) -> None:
        cfg, ctx, run_dir = self._job.cfg, self._ctx, self._job.run_dir
        identity = _next_session(run_dir)
        self._session = int(identity["sessions"])
        self._uri = tracking_uri(cfg.mlflow.uri, run_dir.parent)
        self._tracker = Tracker(
            cfg.mlflow, self._uri, run_dir, training_id=identity["training_id"], on_problem=ctx.warn
        )
        self._tracker.params(flatten(cfg))
        self._tracker.text(dump(cfg), f"config/session_{self._session}.yaml")
        self._tracker.tags(
            {
                "pipeline.sessions": self._session,
                f"pipeline.session_{self._session}": f"from step {self._first_step}, {ctx.world_size} workers",
                "pipeline.data_fingerprint": self._data["fingerprint"],
            }
        )
        ctx.emit(
            {
                "kind": "start",
                "session": self._session,
                "step": self._first_step,
                "num_steps": self._num_steps,
                "global_batch": cfg.train.global_batch,
                "resumed_from": _path(self._newest),
                "world_size": ctx.world_size,
                "num_threads": ctx.num_threads,
                "device": ctx.device.type,
            }
        )

    def step(self, step: int, loss: float, lr: float, epoch: float, num_bad: int) -> None:
        """Log one step: `loss` is the mean over its global batch, of the weights before it."""
        if self._ctx.rank != 0:
            return
        step_s = self._ledger.total(*STEP_PHASES)
        images = (step - self._logged_step) * self._job.cfg.train.global_batch
        metrics = {
            "train/loss": loss,
            "train/lr": lr,
            "train/epoch": epoch,
            "perf/images_per_s": images / (step_s - self._logged_s),
            "perf/data_wait_share": self._ledger.total("data wait") / step_s,
            "data/bad_images": num_bad,
        }
        self._logged_step, self._logged_s = step, step_s
        self._tracker.metrics(step, metrics)
        self._ctx.emit({"kind": "step", "step": step, **metrics})

    def evaluation(self, step: int, scores: dict[str, float]) -> None:
        """Log the scores of the weights after `step` steps."""
        self._scores = scores
        if self._ctx.rank == 0:
            self._tracker.metrics(step, {f"val/{name}": value for name, value in scores.items()})
            self._ctx.emit({"kind": "evaluation", "step": step, **scores})

    def save(self, state: TrainState, scores: dict[str, float] | None) -> None:
        """Write a checkpoint, with the scores if they are of this very step, and drop old ones."""
        if self._ctx.rank != 0:
            return
        folder = self._job.checkpoints
        meta = {**self._data, "metrics": scores or {}, "mlflow_run_id": self._tracker.run_id}
        self._newest = checkpoint.save(folder, state, self._job.cfg, meta)
        checkpoint.prune(folder, self._job.cfg.checkpoint.keep)
        if self._job.cfg.mlflow.checkpoints == "all":
            self._upload(self._newest)
        self._ctx.emit({"kind": "checkpoint", "step": state.step, "path": str(self._newest.path)})

    def bad_image(self, path: str, reason: str) -> None:
        """Name a broken image that this rank has met."""
        self.num_bad += 1
        self._ctx.warn(f"{path} is broken, a uniform image takes its place: {reason}")

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """Tell MLflow of an error that ends the session."""
        if error is not None and self._ctx.rank == 0:
            self._tracker.tags({f"pipeline.session_{self._session}.error": f"{type(error).__name__}: {error}"[:500]})
            self._tracker.close("FAILED", PATIENCE_BEFORE_RESTART_S)

    def finished(self, state: TrainState) -> dict[str, Any]:
        """Publish what the configuration asks for, end the session and return its summary."""
        if self._ctx.rank != 0:
            return {}
        cfg, done = self._job.cfg, state.step == self._num_steps
        asked = cfg.run.stop_at_step is not None and state.step >= cfg.run.stop_at_step
        step_s = self._ledger.total(*STEP_PHASES)
        images = (state.step - self._first_step) * cfg.train.global_batch
        top = checkpoint.best(self._job.checkpoints)
        assert self._newest is not None, "a session ends with a checkpoint"
        if cfg.mlflow.checkpoints == "last":
            self._upload(self._newest)
        elif cfg.mlflow.checkpoints == "best" and top:
            self._upload(top)
        if done and cfg.mlflow.log_model:
            self._tracker.model(self._newest.path)
        with self._ledger.phase("mlflow"):
            waiting = self._tracker.close("FINISHED" if done else "KILLED", PATIENCE_S)
        if waiting:
            self._ctx.warn(
                f"MLflow is away; {waiting} records wait in {self._tracker.spool} for the run's next session"
            )
        return {
            "run": self._job.run_dir.name,
            "run_dir": str(self._job.run_dir),
            "status": "done" if done else "stopped" if asked else "interrupted",
            "step": state.step,
            "num_steps": self._num_steps,
            **{name: self._scores.get(name) for name in ("top1", "top5", "loss")},
            "images_per_s": images / step_s if images else None,
            "seconds": {name: round(s, 3) for name, s in self._ledger.seconds.items()},
            "checkpoint": str(self._newest.path),
            "best_checkpoint": _path(top),
            "sessions": self._session,
            "mlflow_uri": self._uri,
            "mlflow_experiment_id": self._tracker.experiment_id,
            "mlflow_run_id": self._tracker.run_id,
        }

    def _upload(self, saved: Checkpoint) -> None:
        self._tracker.folder(saved.path, f"checkpoints/{saved.path.name}")


def read_identity(run_dir: Path) -> dict[str, Any] | None:
    """What run.json says: "training_id", which finds the MLflow run, and "sessions"; None for a new run.

    Raises:
        ConfigError: it is damaged.
    """
    path = run_dir / "run.json"
    if not path.exists():
        return None
    try:
        identity = json.loads(path.read_text())
        return {"training_id": str(identity["training_id"]), "sessions": int(identity["sessions"])}
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"{path} is damaged; delete it to go on in a new MLflow run") from None


def _next_session(run_dir: Path) -> dict[str, Any]:
    """The training's identity, with this session counted; a new run directory is a new training."""
    path = run_dir / "run.json"
    identity = read_identity(run_dir) or {"training_id": uuid.uuid4().hex, "sessions": 0}
    identity["sessions"] += 1
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(identity))
    temporary.replace(path)
    return identity


def mark_failed(job: Job, reason: str) -> None:
    """Tell MLflow that a training has ended in failure, from outside it: its workers may be dead."""
    identity = read_identity(job.run_dir)
    if identity is None:
        return
    uri = tracking_uri(job.cfg.mlflow.uri, job.run_dir.parent)
    tracker = Tracker(job.cfg.mlflow, uri, job.run_dir, training_id=identity["training_id"], on_problem=lambda _: None)
    tracker.tags({"pipeline.failure": reason[:500]})
    tracker.close("FAILED", PATIENCE_BEFORE_RESTART_S)


def _path(saved: Checkpoint | None) -> str | None:
    return None if saved is None else str(saved.path)
