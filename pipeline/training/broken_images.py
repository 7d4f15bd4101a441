"""The broken images that one attempt meets: each told once, all named in MLflow by rank 0."""

import math

import torch.distributed as dist

from pipeline.events import BrokenImage
from pipeline.runs.spec import WorkerContext
from pipeline.tracking.mlflow_logger import MlflowLogger


class BrokenImages:
    """Gathers what all ranks meet. In several epochs different ranks meet the same image, so they are known by name."""

    def __init__(self, ctx: WorkerContext):
        self._ctx = ctx
        self._met: dict[str, str] = {}  # by this rank: the reason, by the path
        self._of_all: dict[str, str] = {}
        self._num_gathered = self._num_logged = 0

    @property
    def num_met(self) -> int:
        """How many this rank has met."""
        return len(self._met)

    def __len__(self) -> int:
        """How many all ranks had met when they were last gathered."""
        return len(self._of_all)

    def add(self, path: str, reason: str) -> None:
        """Take one that this rank has met."""
        self._met[path] = reason
        self._ctx.emit(BrokenImage(path, reason))

    def gather(self, num_met: float = math.inf) -> None:
        """Have all ranks know of all; called by all of them alike.

        Args:
            num_met: the sum over all ranks at one moment, where it is known: nothing is sent if none is new.
        """
        if num_met <= self._num_gathered:
            return
        met = [self._met] * self._ctx.world_size
        if self._ctx.world_size > 1:
            dist.all_gather_object(met, self._met)
        self._num_gathered = sum(map(len, met))
        for images in met:
            self._of_all |= images

    def log_names(self, mlflow: MlflowLogger, attempt: int) -> None:
        """Name them in MLflow if there are new ones; on rank 0 alone."""
        images = self._of_all | self._met
        if len(images) > self._num_logged:
            self._num_logged = len(images)
            lines = "".join(f"{path}: {reason}\n" for path, reason in sorted(images.items()))
            mlflow.log_text(lines, f"bad_images/attempt_{attempt}.txt")
