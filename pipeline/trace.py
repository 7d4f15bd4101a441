"""Which images each step was trained on, written down where data.trace asks for it, so that anyone can check."""

import json
from typing import TextIO

from pipeline.data.loader import Batch
from pipeline.job import Context, Job


class Trace:
    """Appends a line for each step of this rank to trace/rank_R.jsonl in the run's folder (of this machine):

    {"step": counted from 1, "rank": R, "world_size": W, "rows": rows of the index, in order}

    A step that is trained again after a fault is in it again.
    """

    def __init__(self, job: Job, ctx: Context):
        self._ctx, self._file = ctx, None if not job.cfg.data.trace else _open(job, ctx)

    def step(self, step: int, batch: Batch) -> None:
        if self._file is not None:
            place = {"step": step, "rank": self._ctx.rank, "world_size": self._ctx.world_size}
            print(json.dumps({**place, "rows": batch.rows.tolist()}), file=self._file, flush=True)

    def __enter__(self) -> "Trace":
        return self

    def __exit__(self, *exc: object) -> None:
        if self._file is not None:
            self._file.close()


def _open(job: Job, ctx: Context) -> TextIO:
    folder = job.run.scratch / "trace"
    folder.mkdir(parents=True, exist_ok=True)
    return (folder / f"rank_{ctx.rank}.jsonl").open("a")
