"""Checkpoints beside training: the loop pays for one copy in memory, a thread does the rest.

One checkpoint is written at a time. The thread tries again while the disk is full or the storage away; a
newer checkpoint then takes the place of the one that could not be written.
"""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from pipeline import checkpoint
from pipeline.checkpoint import Checkpoint
from pipeline.config import Config
from pipeline.failures import backoff
from pipeline.state import TrainState
from pipeline.storage import Storage


class Saver:
    """Writes the checkpoints of one session.

    Args:
        folder: where they go; it must exist.
        guard: called just before a checkpoint takes its place; raises if this session is not to write any more.
        written: called in the writing thread with each checkpoint and the seconds that it took.
        report: called in that thread with a line for the user.
    """

    def __init__(
        self,
        folder: Storage,
        cfg: Config,
        *,
        guard: Callable[[], None],
        written: Callable[[Checkpoint, float], None],
        report: Callable[[str], None],
    ):
        self._folder, self._cfg = folder, cfg
        self._guard, self._written, self._report = guard, written, report
        self._host: dict[str, Any] | None = None
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None
        self._replaced = threading.Event()
        self._problem: str | None = None  # what keeps the one being written from being done
        self.num_failed_tries = 0

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is being written, and nothing keeps it from being done."""
        return self._writing is not None and not self._writing.done() and self._problem is None

    def save(self, state: TrainState, meta: dict[str, Any]) -> None:
        """Copy the state and have it written; waits for one being written, unless that does not succeed."""
        self._settle()
        self._host = to_host(state.state_dict(), self._host)
        self._writing = self._thread.submit(self._write, self._host, meta)

    def finish(self, timeout_s: float) -> None:
        """Wait until all is written.

        Raises:
            TimeoutError: it could not be done within `timeout_s` seconds.
        """
        if self._writing is not None:
            try:
                self._writing.result(timeout_s)
            except TimeoutError:
                self._replaced.set()
                raise TimeoutError(
                    f"no checkpoint could be written to {self._folder} for {timeout_s:.0f} s: {self._problem}"
                ) from None
        self._thread.shutdown()

    def _settle(self) -> None:
        if self._writing is not None:
            if self._problem is not None:
                self._replaced.set()
            self._writing.result()
        self._replaced.clear()
        self._problem = None

    def _write(self, state: dict[str, Any], meta: dict[str, Any]) -> None:
        began = time.monotonic()
        for pause in backoff():
            try:
                self._guard()
                saved = checkpoint.save(self._folder, state, self._cfg, meta)
                break
            except OSError as e:
                self.num_failed_tries += 1
                self._problem = str(e)
                self._report(f"the checkpoint of step {state['step']} cannot be written, trying again: {e}")
                if self._replaced.wait(pause):
                    self._report(f"the checkpoint of step {state['step']} gives way to a newer one")
                    return
        self._problem = None
        self._written(saved, time.monotonic() - began)
        try:
            checkpoint.prune(self._folder, self._cfg.checkpoint.keep)
        except OSError as e:
            self._report(f"old checkpoints in {self._folder} cannot be deleted: {e}")


def to_host(value: Any, buffers: Any) -> Any:
    """A nested state's copy in host memory, pinned where it comes from a GPU.

    torch's own DefaultStager does the same; it took twice as long here (docs/reliability.md).

    Args:
        buffers: an earlier copy whose memory is used again, or None.
    """
    copied = _to_host(value, buffers)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return copied


def _to_host(value: Any, buffers: Any) -> Any:
    if isinstance(value, torch.Tensor):
        if buffers is None or buffers.shape != value.shape:
            buffers = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
        return buffers.copy_(value.detach(), non_blocking=True)
    if isinstance(value, dict):
        return {k: _to_host(v, (buffers or {}).get(k)) for k, v in value.items()}
    if isinstance(value, list):
        return [_to_host(v, b) for v, b in zip(value, buffers or [None] * len(value), strict=True)]
    return value
