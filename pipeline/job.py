"""What a rank is handed: the job, its place in the world, and its way to the outside."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config import Config

if TYPE_CHECKING:  # the link's process starts faster without
    import torch

Event = dict[str, Any]  # {"kind": ...}: start, step, evaluation, checkpoint, warning, stopping


@dataclass(frozen=True)
class Job:
    """One training. Paths are absolute.

    resume_from: a checkpoint to begin with where the run has none of its own.
    """

    cfg: Config
    run_dir: Path
    train_index: Path
    val_index: Path
    resume_from: Path | None = None

    @property
    def checkpoints(self) -> Path:
        return self.run_dir / "checkpoints"


@dataclass(frozen=True)
class Context:
    """Where a rank stands, and whom it talks to.

    num_threads: CPU threads for computing. emit: hands an event to whoever watches; returns at once.
    should_stop: whether to save a checkpoint and end; asked at logged steps.
    """

    rank: int
    world_size: int
    device: "torch.device"
    num_threads: int
    emit: Callable[[Event], None]
    should_stop: Callable[[], bool]

    def warn(self, text: str) -> None:
        self.emit({"kind": "warning", "text": text})
