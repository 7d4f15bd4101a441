"""Images that kill workers: when an attempt looks for them, and how all later ones know of them.

What is found is kept in the run's folder, a file for each image, so that every attempt, driver, resume and world size
has it. The files' names hold the fingerprint of the index: another data set has other rows.
"""

import time
from collections.abc import Callable, Sequence

import torch.distributed as dist

from pipeline.config.training import TrainConfig
from pipeline.data.index import Index
from pipeline.data.loading.isolate import Isolation
from pipeline.data.loading.loader import EvalLoader, LoaderContext, TrainLoader
from pipeline.events import CrashingImageFound, ImageSearchStarted
from pipeline.failures import StoppedWaitingError, retry
from pipeline.runs.spec import RunSpec, WorkerContext
from pipeline.storage import Storage
from pipeline.training.schedule import Schedule

FOLDER = "bad_images"
# After the last step that the driver knows of: it lags by 2 s, and images are read and decoded some batches ahead.
STEPS_AHEAD = 128


def avoid_crashing_images(
    spec: RunSpec,
    ctx: WorkerContext,
    context: LoaderContext,
    train: TrainLoader,
    val: EvalLoader,
    first_step: int,
    heartbeat: Callable[[], None],
) -> None:
    """Have the loaders leave out the images that are known to kill; look for more where workers have died.

    Called by all ranks; each looks into its own share.

    Args:
        first_step: that this attempt begins with. heartbeat: called every few seconds of a search.
    """
    timeout_s = float(spec.cfg.cluster.timeout_s)
    known = retry(lambda: _read_known(spec.run), ctx.warn, timeout_s)
    if ctx.deaths:
        crashing = _search(spec, ctx, context, train, val, first_step, known, heartbeat)
        of_all_ranks = [crashing] * ctx.world_size
        if ctx.world_size > 1:  # by this, too, as a folder that nodes mount shows new files late
            dist.all_gather_object(of_all_ranks, crashing)
        for crashing in of_all_ranks:
            known |= crashing
    train.avoid(rows_of(train.index, known))
    val.avoid(rows_of(val.index, known))


def known_crashing_images(run: Storage, index: Index) -> dict[int, str]:
    """The rows of an index that have killed workers of this run, with the reason.

    Raises:
        OSError: the storage does not answer.
    """
    return rows_of(index, _read_known(run))


def rows_of(index: Index, known: dict[str, str]) -> dict[int, str]:
    """Those of an index, by row, among all that are known by their files' names."""
    prefix = _prefix(index)
    return {int(name.removeprefix(prefix)): reason for name, reason in known.items() if name.startswith(prefix)}


def _prefix(index: Index) -> str:
    return f"{index.fingerprint[:12]}-"


def _read_known(run: Storage) -> dict[str, str]:
    folder = run / FOLDER
    names = [name for name in folder.names() if not name.startswith(".")]  # not one that is being written
    return {name: str(folder.read_bytes(name), "utf-8") for name in names}


def _save(run: Storage, name: str, reason: str) -> None:
    folder = run / FOLDER
    folder.make()
    folder.write_bytes(name, reason.encode())


def _search(
    spec: RunSpec,
    ctx: WorkerContext,
    context: LoaderContext,
    train: TrainLoader,
    val: EvalLoader,
    first_step: int,
    known: dict[str, str],
    heartbeat: Callable[[], None],
) -> dict[str, str]:
    """What this rank finds in its share of the steps at which workers died, and of the evaluations among them."""
    schedule = Schedule.create(spec.cfg, len(train.index))
    steps = steps_to_search(ctx.deaths, first_step, schedule.num_steps)
    if ctx.rank == 0:
        text = f"workers died twice without a newer checkpoint: looking for images that kill them in {len(steps)} steps"
        ctx.emit(ImageSearchStarted(text))
    searches = [(train.index, spec.train_index, train.max_batch, train.batch_specs(steps))]
    if evaluates(spec.cfg.train, schedule, steps):
        searches.append(
            (val.index, spec.val_index, val.max_batch, [val.batch_spec(val.rows(chunk)) for chunk in val.chunks])
        )
    crashing: dict[str, str] = {}

    def go_on() -> None:
        heartbeat()
        if ctx.stop_reason() == "interrupted":
            raise StoppedWaitingError("the search is left off")

    until = time.monotonic() + spec.cfg.cluster.timeout_s / 2  # the other ranks wait
    for index, uri, max_batch, batch_specs in searches:

        def record(row: int, reason: str, index: Index = index) -> None:
            """At once: this process may not live to the end of the search."""
            name = f"{_prefix(index)}{row}"
            crashing[name] = reason
            retry(lambda: _save(spec.run, name, reason), ctx.warn, spec.cfg.cluster.timeout_s / 4)
            ctx.emit(CrashingImageFound(index.full_path(row), reason))

        isolation = Isolation(Storage(uri).fetch(), index, spec.cfg.data, context, max_batch, ctx.warn, go_on)
        isolation.search(batch_specs, list(rows_of(index, known)), record, until)
    return crashing


def steps_to_search(deaths: Sequence[int], first_step: int, num_steps: int) -> list[int]:
    """The steps whose images may have killed workers.

    Args:
        deaths: the last step known to be done at each of them: its images, and those before, have not killed.
    """
    starts = {max(death, first_step) for death in deaths}
    return sorted({step for start in starts for step in range(start, min(start + STEPS_AHEAD, num_steps))})


def evaluates(cfg: TrainConfig, schedule: Schedule, steps: Sequence[int]) -> bool:
    """Whether an evaluation may have been under way, which is due after a step."""
    every, end = cfg.eval_every * schedule.steps_per_epoch, schedule.num_steps
    return not steps or any(done % every == 0 or done == end for step in steps for done in (step, step + 1))
