"""Which images each step was trained on and when, written down where data.log_samples asks for it: anyone can check."""

import json
import time
from typing import TextIO

from pipeline.data.loading.loader import Batch
from pipeline.runs.spec import RunSpec, WorkerContext


class SampleLog:
    """Appends a line for each step of this rank to samples/rank_R.jsonl in the run's folder (of this machine):

    {"step": counted from 1, "rank": R, "world_size": W, "time": T, "rows": rows of the index, in order}

    T is when it was done, by the machine's monotonic clock in seconds, which all its processes share; on a GPU, when
    its work was handed over. A step that is trained again after a failure is in it again.
    """

    def __init__(self, spec: RunSpec, ctx: WorkerContext):
        self._ctx, self._file = ctx, None if not spec.cfg.data.log_samples else _open(spec, ctx)

    def step(self, step: int, batch: Batch) -> None:
        if self._file is not None:
            place = {"step": step, "rank": self._ctx.rank, "world_size": self._ctx.world_size}
            now = round(time.monotonic(), 6)
            print(json.dumps({**place, "time": now, "rows": batch.rows.tolist()}), file=self._file, flush=True)

    def __enter__(self) -> "SampleLog":
        return self

    def __exit__(self, *exc: object) -> None:
        if self._file is not None:
            self._file.close()


def _open(spec: RunSpec, ctx: WorkerContext) -> TextIO:
    folder = spec.run.local_dir / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    return (folder / f"rank_{ctx.rank}.jsonl").open("a", encoding="utf-8")
