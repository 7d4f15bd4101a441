"""A trace of some steps, where train.profile asks for it: what each thread and the GPU did, and when."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.autograd.profiler import record_function
from torch.profiler import profile

from pipeline.runs.spec import RunSpec, WorkerContext
from pipeline.tracking.ledger import TimeLedger


class Profiler:
    """Profiles the steps `train.profile` of rank 0, with the ledger's phases as named ranges (NVTX's, too, on a GPU).

    The trace is profile/steps_FIRST_LAST.json.gz in the run's folder (of this machine), for https://ui.perfetto.dev. An
    attempt that begins or ends within these steps traces those that it trains, and names the file by them.

    Args:
        publish: called with the folder, once the trace is in it.
    """

    def __init__(self, spec: RunSpec, ctx: WorkerContext, ledger: TimeLedger, publish: Callable[[Path], None]):
        self._steps = spec.cfg.train.profile if ctx.rank == 0 else None
        self._folder, self._ledger, self._publish = spec.run.local_dir / "profile", ledger, publish
        self._warn, self._on_gpu = ctx.warn, ctx.device.type == "cuda"
        self._profiler: Any = None
        self._range: Any = None
        self._first, self._done = 0, 0
        self._thread = threading.get_ident()

    def step(self, done: int) -> None:
        """`done` steps are done; to be called before the first one, too."""
        if self._steps is None:
            return
        first, last = self._steps
        self._done = done
        if self._profiler is None and first - 1 <= done < last:
            self._first = done + 1
            with self._ledger.phase("logging"):
                self._profiler = profile(acc_events=True)  # else each start says that it clears them
                self._profiler.start()
            self._ledger.listener = self._begin
        elif self._profiler is not None and done == last:
            self.finish()

    def finish(self) -> None:
        """Write what was traced; to be called after the last step."""
        if self._steps is None:
            return
        if self._profiler is None or self._done < self._first:
            steps = ",".join(map(str, self._steps))
            self._warn(f"train.profile=[{steps}]: this attempt trained none of these steps; there is no trace")
        else:
            self.close()
            with self._ledger.phase("logging"):
                self._folder.mkdir(parents=True, exist_ok=True)
                name = f"steps_{self._first}_{self._done}.json.gz"
                self._profiler.export_chrome_trace(str(self._folder / name))
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
