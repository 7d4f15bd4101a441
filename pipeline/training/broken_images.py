"""The broken images that one attempt meets: each told once, all named in MLflow by rank 0."""

from collections.abc import Callable
from threading import Lock
from typing import Any

from pipeline.events import BrokenImage
from pipeline.runs.spec import WorkerContext


class BrokenImages:
    """Gathers what all ranks meet. In another epoch another rank meets the same image, so they are known by name.

    Args:
        gather: sends a value to all ranks and returns those of all, see `ControlBroadcast.gather`.
    """

    def __init__(self, ctx: WorkerContext, gather: Callable[[Any], list[Any]]):
        self._ctx, self._gather = ctx, gather
        self._reasons: dict[str, str] = {}  # by path: of what this rank has met, and others, as far as it knows
        self._unsent: dict[str, str] = {}
        self._lock = Lock()  # on a CPU the thread that decodes adds
        self._num_sent = self._num_logged = 0  # by all ranks; in MLflow
        self.num_met = 0  # by this rank, without those that it knew of

    def __len__(self) -> int:
        return len(self._reasons)

    def add(self, path: str, reason: str) -> None:
        """Take one that this rank has met."""
        self._ctx.emit(BrokenImage(path, reason))
        with self._lock:
            if path not in self._reasons:
                self.num_met += 1
                self._reasons[path] = self._unsent[path] = reason

    def share(self, num_met: int | None = None) -> None:
        """Have all ranks know of all; called by all of them alike.

        Args:
            num_met: the sum over all ranks at one moment, where it is known: nothing is sent if all of it has been.
        """
        if num_met is not None and num_met <= self._num_sent:
            return
        with self._lock:
            unsent, self._unsent = self._unsent, {}
        of_all_ranks = self._gather(unsent)
        with self._lock:
            for images in of_all_ranks:
                self._num_sent += len(images)
                self._reasons |= images

    def log_names(self, log_text: Callable[[str, str], None], attempt: int, *, is_last: bool = False) -> None:
        """Name them in MLflow, on rank 0 alone; many new ones at a time, as it is the whole list each time.

        Args:
            log_text: a text as a file. is_last: also where few are new.
        """
        with self._lock:
            images = sorted(self._reasons.items())
        if len(images) <= self._num_logged * (1 if is_last else 2):
            return
        self._num_logged = len(images)
        lines = "".join(f"{path}: {reason}\n" for path, reason in images)
        log_text(lines, f"broken_images/attempt_{attempt}.txt")
