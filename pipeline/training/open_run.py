"""Runs in storage: making one from a configuration, or opening it again.

STORAGE/NAME/
    index/{train,val}.arrow   where data.train or data.val is no index itself
    checkpoints/step_*/       see `checkpoint`
    run.json                  see `manifest`
    drivers/                  see `claim`
    summary.json              see `summary`
    mlflow-backlog/           of a run on an object store, see `backlog`
and, in a directory of the machine where the storage is none itself,
    mlflow/                   what MLflow has not got yet, see `outbox`
    lock                      held by the driver that trains the run
"""

import dataclasses
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path

from pipeline.config.schema import Config
from pipeline.data.index import Index
from pipeline.data.indexing.build import build_index, fetch_index
from pipeline.data.indexing.find import is_index
from pipeline.errors import UserError
from pipeline.failures import FIRST_LOOK_S, TrainingFailedError, retry
from pipeline.runs import resume
from pipeline.runs.claim import FOLDER, Claim, SupersededError
from pipeline.runs.lock import run_lock
from pipeline.runs.manifest import RunManifest
from pipeline.runs.spec import RunSpec
from pipeline.storage import Storage
from pipeline.tracking.find import find_weights, open_storage
from pipeline.tracking.mlflow_store import tracking_uri, with_absolute_uri
from pipeline.training.schedule import Schedule


@contextmanager
def open_run(
    cfg: Config,
    warn: Callable[[str], None],
    resume_from: str | None = None,
    ending: threading.Event | None = None,
    heartbeat: Callable[[], None] = lambda: None,
    *,
    began: float | None = None,
    command: str = "",
    has_trained: bool = False,
    saved_step: int = 0,
) -> Iterator[RunSpec]:
    """Make or reopen the run that `cfg` names, its folder and indexes, and hold it for this process.

    What can be told to be wrong without the workers is told here, before they start.

    Args:
        resume_from: path or URI of a checkpoint to begin with, where the run has none.
        ending: see `run_lock`. heartbeat: called between its parts, and while an index is built.
        began: the command that this is for, Unix time; None: now. command: see `Claim.take`.
        has_trained: workers of this command had trained before.
        saved_step: see `resume.find_checkpoint`.

    Raises:
        UserError: data, a checkpoint or weights that do not fit, or another process that trains the run.
    """
    storage = open_storage(cfg.run.storage)
    train_source, val_source = Storage(cfg.data.train).uri, Storage(cfg.data.val).uri
    cache_dir = cfg.data.cache_dir and str(Path(cfg.data.cache_dir).absolute())  # workers run in other directories
    data = dataclasses.replace(cfg.data, train=train_source, val=val_source, cache_dir=cache_dir)
    cfg = dataclasses.replace(cfg, run=dataclasses.replace(cfg.run, storage=storage.uri), data=data)
    cfg = with_absolute_uri(cfg)
    assert cfg.run.name is not None, "the supervisor names it"
    run, timeout_s = storage / cfg.run.name, 0.0 if storage.local else FIRST_LOOK_S

    with _as_mistake(f"run.storage={storage}: cannot be used", "name another place"):
        retry(run.make, warn, timeout_s)
        run.local_dir.mkdir(parents=True, exist_ok=True)
        # What is damaged the workers tell.
        look = partial(
            resume.find_checkpoint,
            run,
            resume_from,
            lambda _: None,
            began=began,
            verify_state=False,
            saved_step=saved_step,
        )
        manifest, saved = retry(look, warn, timeout_s)
    heartbeat()
    if saved is not None:
        resume.check_config_compatible(saved, cfg)
    elif cfg.model.weights is not None:
        from pipeline.models import pretrained  # late: it imports torch

        place = find_weights(cfg.model.weights, storage, cfg.mlflow.uri)
        pretrained.check_pretrained(cfg.model, place)
        cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, weights=place))
    tracking_uri(cfg.mlflow.uri, storage)  # tells of a missing one
    with ExitStack() as stack:
        with _as_mistake(f"run.storage={storage}: cannot be used", "name another place"):
            stack.enter_context(run_lock(run, warn, ending, cfg.cluster.timeout_s, heartbeat))
        heartbeat()
        sources, folder = {"train": train_source, "val": val_source}, run / "index"
        indexes = {split: _index(split, source, warn, heartbeat) for split, source in sources.items()}
        train, val = indexes["train"], indexes["val"]
        if len(train.classes) < 2:
            fix = "give at least two class folders, such as cat/ and dog/"
            raise UserError(f"data.train={cfg.data.train}: all images are of one class, {train.classes[0]}; {fix}")
        for split, index in indexes.items():
            _refuse_missing(split, index, cfg, warn)
        val.with_classes(train.classes)
        num_steps = Schedule.create(cfg, len(train)).num_steps
        if saved is not None:
            resume.check_data_compatible(saved, cfg, train, num_steps)
        with _as_mistake(f"run.storage={storage}: cannot be used", "name another place"):
            built = {split: index for split, index in indexes.items() if index.in_memory}
            with _as_second(run, reclaims=has_trained), _saved(built, folder.local_dir) as files:
                claim = retry(partial(Claim.take, run, command, reclaims=has_trained), warn, timeout_s)
                now = _settled(run, manifest, claim, cfg.mlflow.uri, began, warn)
                for split, file in files.items():  # not before: this command may be refused, or come second
                    retry(partial(_store, file, folder, f"{split}.arrow", claim), warn, timeout_s)
                    sources[split] = (folder / f"{split}.arrow").uri
        saved_step = saved.step if saved is not None and saved.place.parent.parent.uri == run.uri else 0
        yield RunSpec(cfg, run, sources["train"], sources["val"], resume_from, claim, saved_step, now.attempts)


def _refuse_missing(split: str, index: Index, cfg: Config, warn: Callable[[str], None]) -> None:
    """Raise UserError where the folder of an index's images has gone; on a cluster the workers may have it."""
    if index.root is None or index.root.local is None:
        return
    try:
        with os.scandir(index.root.local) as entries:
            if next(entries, None) is not None:
                return
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError:  # a mount that fails is waited for where the images are read
        return
    text = f"data.{split}: the index's images are not there: {index.root} is missing or empty"
    if cfg.cluster.address or os.environ.get("RAY_ADDRESS"):
        warn(f"{text} on the driver's machine")
    else:
        raise UserError(f"{text}; restore them, or index them where they are now: pipeline index FOLDER --out FILE")


@contextmanager
def _as_second(run: Storage, *, reclaims: bool) -> Iterator[None]:
    """Who is superseded before a training begins is told so; see `Claim.take` for `reclaims`."""
    try:
        yield
    except SupersededError as e:
        if reclaims:
            raise TrainingFailedError(str(e)) from None
        raise UserError(
            f"run.name={run.name}: another command begins to train it just now; wait for its end, or use another name"
        ) from None


def _settled(
    run: Storage,
    looked: RunManifest,
    claim: Claim,
    mlflow_uri: str | None,
    began: float | None,
    warn: Callable[[str], None],
) -> RunManifest:
    """What run.json says, now that nobody else writes it; where it says nothing, what was looked up before."""
    now = RunManifest.read(run, warn)
    if now is not None:
        _refuse_copy(run, now, claim, mlflow_uri)
    settled = now or looked
    if settled.attempts == 0:  # an earlier command has trained nothing
        settled = dataclasses.replace(settled, began=began or time.time())
    if settled != now or settled.place != run.uri:
        claim.check()
        settled.write(run)
    return settled


def _refuse_copy(run: Storage, manifest: RunManifest, claim: Claim, mlflow_uri: str | None) -> None:
    """Raise UserError where the folder was not moved from where run.json was written, but copied.

    A storage that was copied as a whole, MLflow's SQLite file among it, has its own records.
    """
    if manifest.place in ("", run.uri):
        return
    original = Storage(manifest.place)
    try:
        has_own_mlflow = tracking_uri(mlflow_uri, original.parent) != tracking_uri(mlflow_uri, run.parent)
        other = RunManifest.read(original, lambda _: None)
        is_same_folder = claim.name in (original / FOLDER).names()
    except (OSError, ValueError):  # the place is no more, or of no use here (UserError is a ValueError)
        return
    if other is None or other.training_id != manifest.training_id or is_same_folder or has_own_mlflow:
        return
    raise UserError(
        f"run.name={run.name}: {run} is a copy of {original}, and both would log to one run of MLflow; branch off "
        f"with: pipeline train --resume {run} run.name=NEW; or move {original} away"
    )


@contextmanager
def _as_mistake(what: str, fix: str) -> Iterator[None]:
    """Before a training begins, a storage that does not answer is most likely another than was meant."""
    try:
        yield
    except OSError as e:
        raise UserError(f"{what} ({e.strerror or e}); {fix}") from None


def _index(split: str, source: str, warn: Callable[[str], None], heartbeat: Callable[[], None]) -> Index:
    """Of the images in `source`, built anew, or the one that `source` is."""
    with _as_mistake(f"data.{split}={source}: its index cannot be made or read", "try again, or name another place"):
        if is_index(source):
            return fetch_index(source)
        index, report = build_index(source, progress=lambda *_: heartbeat())
    report.tell_refused(warn)
    return index


@contextmanager
def _saved(indexes: dict[str, Index], folder: Path) -> Iterator[dict[str, Path]]:
    """Files of indexes that were built anew, which nobody else reads; what is left of them in the end is deleted."""
    files = {split: folder / f".{split}.{uuid.uuid4().hex}.arrow" for split in indexes}
    try:
        for split, file in files.items():
            indexes[split].save(file)
        yield files
    finally:
        for file in files.values():
            with suppress(OSError):
                file.unlink(missing_ok=True)


def _store(file: Path, folder: Storage, name: str, claim: Claim) -> None:
    """Put an index where workers look for it."""
    claim.check()
    if not folder.local:
        folder.upload(file, name)
    file.replace(folder.local_dir / name)
