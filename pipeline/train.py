"""The training loop, and what a rank needs to run it. Knows neither Ray nor MLflow."""

import math
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline import checkpoint, resume, retention
from pipeline.checkpoint import Checkpoint
from pipeline.config import Config, ConfigError
from pipeline.data.index import Index, load_index
from pipeline.data.loader import EvalLoader, Place, TrainLoader
from pipeline.data.request import stream
from pipeline.evaluate import StoppedError, evaluate, sync_buffers
from pipeline.failures import READ_CHECKPOINT_S, CheckpointError, NonFiniteError, retry
from pipeline.identity import Identity
from pipeline.job import Context, Job
from pipeline.killers import avoid_killers
from pipeline.memory import InParts, MicroBatches
from pipeline.model import drop_rates
from pipeline.network import as_trained
from pipeline.perf import Ledger
from pipeline.precision import Decision, decide, hardware_of, with_precision
from pipeline.profile import Profile
from pipeline.record import Recorder
from pipeline.schedule import Schedule, lr_at, lr_note
from pipeline.state import TrainState
from pipeline.step import train_step
from pipeline.storage import Storage
from pipeline.trace import Trace
from pipeline.votes import Votes, Word
from pipeline.watchdog import Watchdog
from pipeline.weights import begin_with


class NonFiniteLossError(NonFiniteError):
    """The loss became NaN or infinite; the text says at which step and on which samples."""


def fit(job: Job, ctx: Context) -> dict[str, Any]:
    """Train to the last step, from the newest valid checkpoint if there is one.

    Returns:
        On rank 0 the summary that `pipeline train --json` prints, elsewhere nothing.

    Raises:
        ConfigError: a checkpoint that does not fit. NonFiniteError. BadDataError.
    """
    with Watchdog(job.cfg.cluster.timeout_s) as watchdog, ExitStack() as stack:
        return _fit(job, ctx, watchdog, stack)


def _fit(job: Job, ctx: Context, watchdog: Watchdog, stack: ExitStack) -> dict[str, Any]:
    entered = time.time()
    torch.set_num_threads(ctx.num_threads)
    if ctx.device.type == "cuda":
        torch.cuda.set_device(ctx.device)
        torch.backends.cudnn.benchmark = True  # shapes stay the same
    job, identity, resumed, precision = _look(job, ctx)
    watchdog.feed()
    cfg = job.cfg
    index, val_index = (_open_index(uri, job, ctx, resumed) for uri in (job.train_index, job.val_index))
    watchdog.feed()
    schedule = Schedule.create(cfg, len(index))
    eval_every = cfg.train.eval_every * schedule.steps_per_epoch
    stop_step = min(schedule.num_steps, cfg.run.stop_at_step or schedule.num_steps)
    state = TrainState.create(cfg, len(index.classes), ctx.device)
    _begin(state, cfg, index, ctx, resumed, precision)
    ledger = _ledger(ctx, identity, resumed, entered)
    recorder = Recorder(job, ctx, index, identity, resumed, ledger, schedule.num_steps, precision.reason, watchdog.feed)
    stack.enter_context(recorder)  # from now on MLflow is told of any end
    train_loader, val_loader = _loaders(job, ctx, index, val_index, recorder, state.step, watchdog.feed)
    net = as_trained(state.model, cfg, ctx.world_size, ctx.device, ledger)
    # A rank that tries a size out alone would wait for the others' statistics of BatchNorm.
    tries = ctx.device.type == "cuda" and not (cfg.model.sync_bn and ctx.world_size > 1)
    micro_batches = MicroBatches(cfg.train, tries, ctx.warn)
    in_parts = InParts(ctx.warn)
    votes = Votes(ctx.world_size, cfg.cluster.timeout_s)

    def due(every: int) -> bool:
        return state.step % every == 0 or state.step == schedule.num_steps

    def evaluated() -> bool:
        """Evaluate the weights as they are; False where all are to stop, which they look for between chunks."""
        with ledger.phase("evaluation"):
            sync_buffers(state.best_model)
            try:
                predictions = evaluate(
                    state.best_model,
                    val_loader,
                    precision=cfg.train.precision,
                    device=ctx.device,
                    in_parts=in_parts,
                    heartbeat=watchdog.feed,
                    stopped=lambda: votes.exchange(Word(stop=ctx.stop_reason() is not None)).stop,
                )
            except StoppedError:
                return False
        with ledger.phase("checkpoint"):
            recorder.evaluation(state, predictions)
        return True

    losses: list[Tensor] = []
    with (
        closing(train_loader),
        closing(val_loader),
        closing(Profile(job, ctx, ledger, recorder.publish)) as profile,
        Trace(job, ctx) as trace,
    ):
        profile.step(state.step)
        # A session that had to end between saving and evaluating has left that to this one.
        unscored = resumed is not None and state.step > 0 and not resumed.meta["metrics"]
        owes_evaluation = unscored and due(eval_every) and not evaluated()
        batches = train_loader.from_step(state.step, state.step if owes_evaluation else stop_step)
        for batch in ledger.steps(batches, compiling=cfg.model.compile != "none"):
            lr = lr_at(state.step, cfg.optim, schedule)
            micro_batch = micro_batches.size(state, net, batch)
            loss = train_step(
                state,
                net,
                batch,
                cfg.train,
                lr=lr,
                world_size=ctx.world_size,
                micro_batch=micro_batch,
                mark=ledger.switch,
            )
            losses.append(loss)
            profile.step(state.step)
            trace.step(state.step, batch)
            watchdog.feed()
            recorder.progress(state.step)
            word = votes.exchange(Word(stop=ctx.stop_reason() is not None, save=recorder.wants_save))

            logging, evaluating = due(cfg.train.log_every), due(eval_every)
            ending = word.stop or state.step == stop_step
            saving = due(cfg.checkpoint.every) or word.save or ending
            if not (logging or evaluating or saving):
                continue
            values, num_bad = _gather(losses, recorder.num_bad, ctx)  # the only wait for the device
            losses.clear()
            _check_finite(values, state.step, cfg, schedule, len(index))
            if logging:
                with ledger.phase("logging"):
                    recorder.step(state.step, values[-1], lr, state.step / schedule.steps_per_epoch, num_bad)
            if saving:  # before an evaluation, which may take longer than a node has that is to go
                with ledger.phase("checkpoint"):
                    recorder.save(state, now=ending, is_scored_later=evaluating and not word.stop)
            owes_evaluation = evaluating and (word.stop or not evaluated())
            if ending or owes_evaluation:
                break
        votes.finish()
        with ledger.phase("checkpoint"):
            recorder.save(state, now=True)
        watchdog.feed()
        profile.finish()
        return recorder.finished(state, val_loader, owes_evaluation=owes_evaluation)


def _look(job: Job, ctx: Context) -> tuple[Job, Identity, Checkpoint | None, Decision]:
    """Find the newest valid checkpoint, chosen by rank 0 for all, so that all ranks start from one state.

    Returns:
        The job, in the precision that suits the checkpoint and all ranks; whose run it is, as far as rank 0 knows it;
        the checkpoint; and how the precision was decided.
    """
    identity, found = Identity(), None
    timeout_s = job.cfg.cluster.timeout_s
    if ctx.rank == 0:
        began = ctx.marks[0][1] if ctx.marks else None
        look = partial(resume.look, job.run, job.resume_from, ctx.warn, began=began)
        identity, found = retry(partial(look, claim=job.claim, saved_step=job.saved_step), ctx.warn, timeout_s)
    mine = (found and found.place.uri, identity.precision, hardware_of(ctx.device))
    told = [mine] * ctx.world_size
    if ctx.world_size > 1:
        dist.all_gather_object(told, mine)
        if ctx.rank > 0 and told[0][0]:
            place = Storage(told[0][0])
            # Rank 0 has read it whole. What is amiss here is this machine's view of the storage.
            late = min(READ_CHECKPOINT_S, timeout_s)
            read = partial(checkpoint.read, place, use_copy=True)
            found = retry(lambda: retry(read, ctx.warn, late, on=CheckpointError), ctx.warn, timeout_s)
    if found is not None:
        retention.forget_copies(found.place.parent, found.place.name)
    kept = told[0][1] if found is None else found.cfg.train.precision
    precision = decide(job.cfg.train.precision, [hardware for _, _, hardware in told], kept)
    return replace(job, cfg=with_precision(job.cfg, precision.precision)), identity, found, precision


def _open_index(uri: str, job: Job, ctx: Context, resumed: Checkpoint | None) -> Index:
    """An index file. Where training has begun it was there before: a mount that comes late is waited for."""
    late = (OSError, ConfigError) if ctx.restarted or resumed else OSError
    return retry(lambda: load_index(Storage(uri).fetch()), ctx.warn, job.cfg.cluster.timeout_s, on=late)


def _begin(
    state: TrainState, cfg: Config, index: Index, ctx: Context, resumed: Checkpoint | None, precision: Decision
) -> None:
    """Load the checkpoint, or the weights that a new training begins with; tell what is not as one might think."""
    notes = [lr_note(cfg)]
    if ctx.rank == 0 and precision.warning:
        ctx.warn(precision.warning)
    if resumed is not None:
        resume.restore(state, resumed, cfg, index)
    elif cfg.model.weights is not None:
        notes.append(begin_with(state.model, cfg.model.weights, index.classes))
        if state.ema is not None:
            state.ema.load_state_dict(state.model.state_dict())
    for note in filter(None, notes if ctx.rank == 0 else []):
        ctx.emit({"kind": "note", "text": note})


def _ledger(ctx: Context, identity: Identity, resumed: Checkpoint | None, entered: float) -> Ledger:
    """What this training has counted so far, and the time since, in which this session was started.

    After a fault, what came after the checkpoint is lost, the steps to be done again like the time without training:
    all of it is recovery. A session that its user starts counts from the command on.
    """
    own = resumed if resumed is not None and resumed.meta["training_id"] == identity.training_id else None
    if ctx.restarted or identity.open:
        phase, since = "recovery", own.meta.get("time", identity.began) if own else identity.began
    else:
        phase, since = "start-up", ctx.marks[0][1] if ctx.marks else entered
    before = dict(own.meta.get("seconds", {})) if own else {}
    before[phase] = before.get(phase, 0.0) + max(0.0, time.time() - since)
    return Ledger(phase, ctx.device, before)


def _loaders(
    job: Job,
    ctx: Context,
    index: Index,
    val_index: Index,
    recorder: Recorder,
    step: int,
    heartbeat: Callable[[], None],
) -> tuple[TrainLoader, EvalLoader]:
    cfg = job.cfg
    num_threads, patience_s = cfg.data.decode_threads or ctx.num_threads, float(cfg.cluster.timeout_s)
    place = Place(ctx.rank, ctx.world_size, ctx.device, num_threads, patience_s)
    train = TrainLoader(
        index,
        cfg.data,
        place,
        recorder.bad_image,
        global_batch=cfg.train.global_batch,
        seed=cfg.run.seed,
        drop_rates=drop_rates(cfg.model),
        warn=ctx.warn,
    )
    val_index = val_index.with_classes(index.classes)
    val = EvalLoader(val_index, cfg.data, place, recorder.bad_image, batch=cfg.train.eval_batch, warn=ctx.warn)
    avoid_killers(job, ctx, place, train, val, step, heartbeat)
    return train, val


def _gather(losses: list[Tensor], num_bad: int, ctx: Context) -> tuple[list[float], int]:
    """Over all ranks: the loss of each step since the last call, and the broken images met."""
    sums = torch.cat([torch.stack(losses), torch.tensor([float(num_bad)], device=ctx.device)])
    if ctx.world_size > 1:
        dist.all_reduce(sums)
    *values, bad = sums.tolist()
    return values, int(bad)


def _check_finite(values: list[float], step: int, cfg: Config, schedule: Schedule, num_samples: int) -> None:
    """Raise NonFiniteLossError for the first of the last `len(values)` steps whose loss is not a number."""
    for done, value in enumerate(values, step - len(values) + 1):
        if math.isfinite(value):
            continue
        order = stream(cfg.data, num_samples, cfg.train.global_batch, cfg.run.seed)
        epoch, start, stop = order.positions(done - 1, 0, 1)
        rows = order.rows(epoch, start, stop)
        raise NonFiniteLossError(
            f"the loss of step {done} is {value} (epoch {epoch}, "
            f"learning rate {lr_at(done - 1, cfg.optim, schedule):g}); "
            f"checkpoints before it are untouched; rows of the index in its batch: {' '.join(map(str, rows))}"
        )
