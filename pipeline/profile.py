"""A trace of some steps, where train.profile asks for it: what each thread and the GPU did, and when."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.autograd.profiler import record_function
from torch.profiler import profile

from pipeline.job import Context, Job
from pipeline.perf import Ledger


class Profile:
    """Profiles the steps `train.profile` of rank 0, with the ledger's phases as named ranges (NVTX's, too, on a GPU).

    The trace is profile/steps_FIRST_LAST.json.gz in the run's folder (of this machine), for https://ui.perfetto.dev.

    Args:
        publish: called with the folder, once the trace is in it.
    """

    def __init__(self, job: Job, ctx: Context, ledger: Ledger, publish: Callable[[Path], None]):
        self._steps = job.cfg.train.profile if ctx.rank == 0 else None
        self._folder, self._ledger, self._publish = job.run.scratch / "profile", ledger, publish
        self._on_gpu = ctx.device.type == "cuda"
        self._profiler: Any = None
        self._range: Any = None
        self._thread = threading.get_ident()

    def step(self, done: int) -> None:
        """`done` steps are done; to be called before the first one, too."""
        if self._steps is None:
            return
        first, last = self._steps
        if self._profiler is None and first - 1 <= done < last:
            with self._ledger.phase("logging"):
                self._profiler = profile(acc_events=True)  # else each start says that it clears them
                self._profiler.start()
            self._ledger.listener = self._begin
        elif self._profiler is not None and done == last:
            self.close()
            with self._ledger.phase("logging"):
                self._folder.mkdir(parents=True, exist_ok=True)
                self._profiler.export_chrome_trace(str(self._folder / f"steps_{first}_{last}.json.gz"))
                self._publish(self._folder)
            self._steps = None

    def close(self) -> None:
        """Stop profiling."""
        if self._ledger.listener is not None:
            self._ledger.listener = None
            self._end()
            self._profiler.stop()

    def _begin(self, name: str) -> None:
        """A phase begins."""
        if threading.get_ident() != self._thread:  # autograd's, on a GPU; a range ends where it began
            return
        self._end()
        self._range = record_function(name)
        self._range.__enter__()
        if self._on_gpu:
            torch.cuda.nvtx.range_push(name)  # type: ignore[no-untyped-call]

    def _end(self) -> None:
        if self._range is not None:
            self._range.__exit__(None, None, None)
            self._range = None
            if self._on_gpu:
                torch.cuda.nvtx.range_pop()  # type: ignore[no-untyped-call]
