"""The training loop of one rank. Knows neither Ray nor MLflow."""

import math
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from typing import Any

import torch

from pipeline.config.schema import Config
from pipeline.data.batch_spec import make_sampler
from pipeline.events import AttemptEnded
from pipeline.failures import COMPILE_S, NonFiniteError, StoppedWaitingError
from pipeline.runs.spec import RunSpec, WorkerContext
from pipeline.training.backends import set_backends
from pipeline.training.broken_images import BrokenImages
from pipeline.training.compilation import Compiler, decide, missing_tool
from pipeline.training.control import ControlBroadcast, ControlFlags
from pipeline.training.ddp import wrap_model
from pipeline.training.evaluation import StoppedError, evaluate, sync_buffers
from pipeline.training.losses import Interval, LossReader
from pipeline.training.microbatch import AutoMicrobatch, OomSplitter, may_try_out
from pipeline.training.profiler import Profiler
from pipeline.training.recorder import Recorder
from pipeline.training.replicas import compare_replicas
from pipeline.training.sample_log import SampleLog
from pipeline.training.schedule import Schedule, lr_at
from pipeline.training.setup import begin, choose_checkpoint, make_ledger, make_loaders, wait_for_index
from pipeline.training.state import TrainState
from pipeline.training.step import train_step
from pipeline.training.watchdog import Watchdog


class NonFiniteLossError(NonFiniteError):
    """The loss became NaN or infinite; the text says at which step and on which samples."""


def fit(spec: RunSpec, ctx: WorkerContext) -> dict[str, Any]:
    """Train to the last step, from the newest valid checkpoint if there is one.

    Returns:
        On rank 0 the summary that `pipeline train --json` prints, elsewhere nothing.

    Raises:
        UserError: a checkpoint that does not fit. NonFiniteError. BadDataError.
    """
    with Watchdog(spec.cfg.cluster.timeout_s) as watchdog, ExitStack() as stack:
        return _fit(spec, ctx, watchdog, stack)


def _fit(spec: RunSpec, ctx: WorkerContext, watchdog: Watchdog, stack: ExitStack) -> dict[str, Any]:
    entered = time.time()
    torch.set_num_threads(ctx.num_threads)
    set_backends(spec.cfg.train, ctx.device)
    spec, manifest, resumed, precision = choose_checkpoint(spec, ctx)
    watchdog.feed()
    cfg = spec.cfg
    index, val_index = (wait_for_index(uri, spec, ctx, resumed) for uri in (spec.train_index, spec.val_index))
    watchdog.feed()
    schedule = Schedule.create(cfg, len(index))
    eval_every = cfg.train.eval_every * schedule.steps_per_epoch
    stop_step = min(schedule.num_steps, cfg.run.stop_at_step or schedule.num_steps)
    state = TrainState.create(cfg, len(index.classes), ctx.device)
    begin(state, cfg, index, ctx, resumed, precision)
    ledger = make_ledger(ctx, manifest, resumed, entered)
    patience_s = 0.0 if cfg.model.compile == "none" else COMPILE_S
    control = ControlBroadcast(ctx.world_size, cfg.cluster.timeout_s, patience_s)
    host, lack = socket.gethostname(), missing_tool(ctx.device)
    hosts, missing = zip(*control.gather((host, lack and f"{lack} on {host}")), strict=True)
    began_with = resumed.meta.get("compile", resumed.cfg.model.compile) if resumed else None
    compilation = decide(cfg, ctx.device, missing=missing, num_steps=schedule.num_steps, kept=began_with)
    is_auto, mode = cfg.model.compile == "auto", compilation.mode
    cfg = compilation.applied_to(cfg)
    broken_images = BrokenImages(ctx, control.gather)
    recorder = Recorder(
        spec,
        ctx,
        index,
        manifest,
        broken_images,
        resumed,
        ledger,
        schedule.num_steps,
        precision.reason,
        compilation,
        hosts,
        watchdog.feed,
    )
    stack.enter_context(recorder)  # from now on MLflow is told of any end
    train_loader, val_loader = make_loaders(spec, ctx, index, val_index, broken_images, state.step, watchdog.feed)
    net = wrap_model(state.model, cfg, ctx.world_size, ctx.device, ledger)
    may_try = may_try_out(cfg, ctx.device, ctx.world_size)
    auto_microbatch = AutoMicrobatch(cfg.train, may_try or mode != "none", ctx.warn, mode)
    compile_first = partial(auto_microbatch.size, state, net)
    has_worked = began_with == mode
    compiler = Compiler(mode, is_auto, has_worked, compile_first, control.gather_late, watchdog.feed, ctx)
    oom_splitter = OomSplitter(ctx.warn)

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
                    in_parts=oom_splitter,
                    heartbeat=watchdog.feed,
                    stopped=lambda: control.exchange(ControlFlags(stop=ctx.stop_reason() is not None)).stop,
                )
            except StoppedError:
                return False
            broken_images.share()
        with ledger.phase("checkpoint"):
            recorder.log_evaluation(state, predictions)
        return True

    losses = LossReader(ctx, ledger, late=ctx.device.type == "cuda")

    def log(intervals: list[Interval]) -> None:
        for interval in intervals:
            _check_finite(interval, cfg, schedule, len(index))
            if interval.is_logged:
                with ledger.phase("logging"):
                    recorder.log_step(interval, schedule)

    def end_alone() -> dict[str, Any]:
        """Rank 0's end after the last step that is done, while others may be in the midst of the next one."""
        watchdog.feed()
        log(losses.rest())
        with ledger.phase("checkpoint"):
            recorder.save(state, now=True)
        watchdog.feed()
        return recorder.finish(state, val_loader, owes_evaluation=True)

    with (
        closing(train_loader),
        closing(val_loader),
        closing(Profiler(spec, ctx, ledger, recorder.publish)) as profile,
        SampleLog(spec, ctx) as sample_log,
        _ended_where_images_stay_away(ctx, state, end_alone),
    ):
        profile.step(state.step)
        # An attempt that had to end between saving and evaluating has left that to this one.
        unscored = resumed is not None and state.step > 0 and not resumed.meta["metrics"]
        owes_evaluation = unscored and due(eval_every) and not evaluated()
        batches = train_loader.from_step(state.step, state.step if owes_evaluation else stop_step)
        for batch in ledger.steps(batches, compiler.is_new):
            lr = lr_at(state.step, cfg.optim, schedule)
            if ledger.compiling and not compiler.compile_for(batch):
                auto_microbatch = AutoMicrobatch(cfg.train, may_try, ctx.warn)  # uncompiled it takes more memory
            micro_batch = auto_microbatch.size(state, net, batch)
            loss = train_step(
                state,
                net,
                batch,
                cfg.train,
                lr=lr,
                world_size=ctx.world_size,
                micro_batch=micro_batch,
                mark=ledger.start_phase,
            )
            losses.add(loss)
            profile.step(state.step)
            sample_log.step(state.step, batch)
            watchdog.feed()
            recorder.report_progress(state.step)
            flags = control.exchange(ControlFlags(stop=ctx.stop_reason() is not None, save=recorder.wants_save))

            logging, evaluating = due(cfg.train.log_every), due(eval_every)
            ending = flags.stop or state.step == stop_step
            saving = due(cfg.checkpoint.every) or flags.save or ending
            waits = evaluating or saving
            if cfg.train.check_replicas and (waits or due(cfg.train.check_replicas)):
                with ledger.phase("communication wait"):
                    compare_replicas(state, ctx, hosts)
            if not (logging or waits):
                continue
            intervals = losses.end_interval(state.step, broken_images.num_met, is_logged=logging, now=waits)
            if intervals:
                with ledger.phase("logging"):
                    broken_images.share(intervals[-1].num_bad)
            log(intervals)
            if saving:  # before an evaluation, which may take longer than a node has that is to go
                with ledger.phase("checkpoint"):
                    recorder.save(state, now=ending, is_scored_later=evaluating and not flags.stop)
            owes_evaluation = evaluating and (flags.stop or not evaluated())
            if ending or owes_evaluation:
                break
        control.finish()
        with ledger.phase("checkpoint"):
            recorder.save(state, now=True)
        watchdog.feed()
        profile.finish()
        return recorder.finish(state, val_loader, owes_evaluation=owes_evaluation)


@contextmanager
def _ended_where_images_stay_away(
    ctx: WorkerContext, state: TrainState, end_alone: Callable[[], dict[str, Any]]
) -> Iterator[None]:
    """Have rank 0 end the attempt where all are to stop and images do not come."""
    try:
        yield
    except StoppedWaitingError as e:
        if ctx.rank == 0 and state.step > 0:
            ctx.warn(f"{e}: ending after step {state.step}")
            ctx.emit(AttemptEnded(end_alone()))
            e.has_ended = True
        raise


def _check_finite(interval: Interval, cfg: Config, schedule: Schedule, num_samples: int) -> None:
    """Raise NonFiniteLossError for the first step of an interval whose loss is not a number."""
    for done, value in enumerate(interval.losses, interval.step - len(interval.losses) + 1):
        if math.isfinite(value):
            continue
        sampler = make_sampler(cfg.data, num_samples, cfg.train.global_batch, cfg.run.seed)
        epoch, start, stop = sampler.positions(done - 1, 0, 1)
        rows = sampler.rows(epoch, start, stop)
        raise NonFiniteLossError(
            f"the loss of step {done} is {value} (epoch {epoch}, "
            f"learning rate {lr_at(done - 1, cfg.optim, schedule):g}); "
            f"earlier checkpoints are fine: resume with a lower optim.lr or with train.clip_norm; "
            f"rows of the index in its batch: {' '.join(map(str, rows))}"
        )
