"""What a rank is handed: the training, its place in the world, and its way to the outside."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pipeline.config.schema import Config
from pipeline.events import Event, Warned
from pipeline.runs.claim import Claim
from pipeline.storage import Storage

if TYPE_CHECKING:  # the driver starts faster without
    import torch

CHECKPOINTS = "checkpoints"  # the folder in a run's, and that of its MLflow artifacts
# Why an attempt ends before the last step: the user wants it, or workers are to come or go.
StopReason = Literal["interrupted", "resize"]


@dataclass(frozen=True)
class Failure:
    """What ended an attempt without a checkpoint. step: the last one known to be done. time: seen, Unix seconds."""

    text: str
    step: int | None
    time: float


@dataclass(frozen=True)
class RunSpec:
    """One training.

    run: its folder. train_index, val_index: paths or URIs of index files. resume_from: path or URI of a
    checkpoint to begin with where the run has none of its own. claim: the driver's to the run, where there is one.
    saved_step: of the run's own newest checkpoint, as the driver has seen it; 0: there was none. attempts: of the run,
    before this driver's first one.
    """

    cfg: Config
    run: Storage
    train_index: str
    val_index: str
    resume_from: str | None = None
    claim: Claim | None = None
    saved_step: int = 0
    attempts: int = 0

    @property
    def checkpoints(self) -> Storage:
        return self.run / CHECKPOINTS

    def attempt_name(self, number: int) -> str:
        """Of an attempt of this driver; later ones', also of later drivers, are higher."""
        return f"{self.claim.name if self.claim else ''}-{number:08d}"


Marks = tuple[tuple[str, float], ...]  # what has been done, in order, and when (Unix time); the first is the beginning


@dataclass(frozen=True)
class WorkerContext:
    """Where a rank stands, and whom it talks to.

    num_threads: CPU threads for computing. emit: hands an event to whoever watches; returns at once.
    stop_reason: why to save a checkpoint and end, if so; asked at every step. progress: told the steps done.
    failures: those since the last attempt began. marks: of this attempt's start. restarted: not by the user.
    deaths: where workers' processes died twice or more since the last checkpoint, the steps known to be done by then.
    """

    rank: int
    world_size: int
    device: "torch.device"
    num_threads: int
    emit: Callable[[Event], None]
    stop_reason: Callable[[], StopReason | None] = lambda: None
    progress: Callable[[int], None] = lambda step: None
    failures: tuple[Failure, ...] = ()
    marks: Marks = ()
    restarted: bool = False
    deaths: tuple[int, ...] = ()

    def warn(self, text: str) -> None:
        self.emit(Warned(text))
