"""What a rank does before its first step: the checkpoint that all ranks begin with, the indexes, the loaders."""

import math
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch.distributed as dist

from pipeline.config.schema import Config
from pipeline.data.index import Index, load_index
from pipeline.data.loading.loader import EvalLoader, LoaderContext, TrainLoader
from pipeline.errors import UserError
from pipeline.events import Note
from pipeline.failures import READ_CHECKPOINT_S, STOP_WAIT_OTHERS_S, STOP_WAIT_S, CheckpointError, retry
from pipeline.models.pretrained import load_pretrained
from pipeline.models.resnet import drop_rates
from pipeline.runs import checkpoint, resume, retention
from pipeline.runs.checkpoint import Checkpoint
from pipeline.runs.manifest import RunManifest
from pipeline.runs.spec import RunSpec, WorkerContext
from pipeline.storage import Storage
from pipeline.tracking.ledger import TimeLedger
from pipeline.training.broken_images import BrokenImages
from pipeline.training.crashing_images import avoid_crashing_images
from pipeline.training.precision import Decision, decide, hardware_of, with_precision
from pipeline.training.schedule import Schedule, lr_note
from pipeline.training.state import TrainState


def choose_checkpoint(spec: RunSpec, ctx: WorkerContext) -> tuple[RunSpec, RunManifest, Checkpoint | None, Decision]:
    """Find the newest valid checkpoint, chosen by rank 0 for all, so that all ranks start from one state.

    Returns:
        The run, in the precision that suits the checkpoint and all ranks; whose run it is, as far as rank 0 knows it;
        the checkpoint; and how the precision was decided.
    """
    manifest, saved = RunManifest(), None
    timeout_s = spec.cfg.cluster.timeout_s
    if ctx.rank == 0:
        began = ctx.marks[0][1] if ctx.marks else None
        look = partial(resume.find_checkpoint, spec.run, spec.resume_from, ctx.warn, began=began)
        manifest, saved = retry(partial(look, claim=spec.claim, saved_step=spec.saved_step), ctx.warn, timeout_s)
    own = (saved and saved.place.uri, manifest.precision, hardware_of(ctx.device))
    all_ranks = [own] * ctx.world_size
    if ctx.world_size > 1:
        dist.all_gather_object(all_ranks, own)
        if ctx.rank > 0 and all_ranks[0][0]:
            checkpoint_folder = Storage(all_ranks[0][0])
            # Rank 0 has read it whole. What is wrong here is this machine's view of the storage.
            late = min(READ_CHECKPOINT_S, timeout_s)
            read = partial(checkpoint.load, checkpoint_folder, use_copy=True)
            saved = retry(lambda: retry(read, ctx.warn, late, on=CheckpointError), ctx.warn, timeout_s)
    if saved is not None:
        retention.forget_copies(saved.place.parent, saved.place.name)
    kept = all_ranks[0][1] if saved is None else saved.cfg.train.precision
    workers = [hardware for _, _, hardware in all_ranks]
    precision = decide(spec.cfg.train.precision, workers, kept, tf32=spec.cfg.train.tf32)
    return replace(spec, cfg=with_precision(spec.cfg, precision.precision)), manifest, saved, precision


def wait_for_index(uri: str, spec: RunSpec, ctx: WorkerContext, resumed: Checkpoint | None) -> Index:
    """An index file. Where training has begun it was there before: a mount that comes late is waited for."""
    late = (OSError, UserError) if ctx.restarted or resumed else OSError
    return retry(lambda: load_index(Storage(uri).fetch()), ctx.warn, spec.cfg.cluster.timeout_s, on=late)


def begin(
    state: TrainState, cfg: Config, index: Index, ctx: WorkerContext, resumed: Checkpoint | None, precision: Decision
) -> None:
    """Load the checkpoint, or the weights that a new training begins with; tell what is not as one might think."""
    notes = [lr_note(cfg)]
    if ctx.rank == 0 and precision.warning:
        ctx.warn(precision.warning)
    if resumed is not None:
        restore(state, resumed, cfg, index)
    elif cfg.model.weights is not None:
        notes.append(load_pretrained(state.model, cfg.model.weights, index.classes))
        if state.ema is not None:
            state.ema.load_state_dict(state.model.state_dict())
    for note in filter(None, notes if ctx.rank == 0 else []):
        ctx.emit(Note(note))


def restore(state: TrainState, saved: Checkpoint, cfg: Config, index: Index) -> None:
    """Load a checkpoint into `state`; raises UserError where it does not fit the configuration or the images."""
    resume.check_config_compatible(saved, cfg)
    resume.check_data_compatible(saved, cfg, index, Schedule.create(cfg, len(index)).num_steps)
    try:
        state.load_state_dict(saved.state())
        state.best_top1 = max(state.best_top1, saved.top1 or -1.0)  # it may have been evaluated after it was saved
    except ValueError as e:
        raise UserError(f"{saved.place} does not fit this configuration: {e}; use another run.name") from None


def make_ledger(ctx: WorkerContext, manifest: RunManifest, resumed: Checkpoint | None, entered: float) -> TimeLedger:
    """What this training has counted so far, and the time since, in which this attempt was started.

    After a failure, what came after the checkpoint is lost, the steps to be done again like the time without training:
    all of it is recovery. An attempt that its user starts counts from the command on.
    """
    own = resumed if resumed is not None and resumed.meta["training_id"] == manifest.training_id else None
    if ctx.restarted or manifest.open:
        phase, since = "recovery", own.meta.get("time", manifest.began) if own else manifest.began
    else:
        phase, since = "start-up", ctx.marks[0][1] if ctx.marks else entered
    before = dict(own.meta.get("seconds", {})) if own else {}
    before[phase] = before.get(phase, 0.0) + max(0.0, time.time() - since)
    return TimeLedger(phase, ctx.device, before)


def make_loaders(
    spec: RunSpec,
    ctx: WorkerContext,
    index: Index,
    val_index: Index,
    broken_images: BrokenImages,
    step: int,
    heartbeat: Callable[[], None],
) -> tuple[TrainLoader, EvalLoader]:
    cfg = spec.cfg
    # On a GPU's node two cores are left: to the thread that launches kernels, and to readers and the driver.
    num_threads = cfg.data.decode_threads or max(1, ctx.num_threads - (2 if ctx.device.type == "cuda" else 0))
    retry_timeout_s = float(cfg.cluster.timeout_s)
    context = LoaderContext(ctx.rank, ctx.world_size, ctx.device, num_threads, retry_timeout_s)
    when_stopping = STOP_WAIT_S if ctx.rank == 0 else STOP_WAIT_OTHERS_S

    def patience() -> float:
        return math.inf if ctx.stop_reason() is None else when_stopping

    train = TrainLoader(
        index,
        cfg.data,
        context,
        broken_images.add,
        global_batch=cfg.train.global_batch,
        seed=cfg.run.seed,
        drop_rates=drop_rates(cfg.model),
        warn=ctx.warn,
        patience=patience,
    )
    val_index = val_index.with_classes(index.classes)
    val = EvalLoader(
        val_index, cfg.data, context, broken_images.add, batch=cfg.train.eval_batch, warn=ctx.warn, patience=patience
    )
    avoid_crashing_images(spec, ctx, context, train, val, step, heartbeat)
    return train, val
