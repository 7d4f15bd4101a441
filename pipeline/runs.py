"""Runs on disk: making one from a configuration, and finding one again.

STORAGE/NAME/
    index/{train,val}.arrow   where data.train or data.val is a folder
    checkpoints/step_*/       see `checkpoint`
    mlflow/                   what MLflow has not got yet, see `tracking`
    run.json                  the training's identity and its sessions so far
"""

import dataclasses
import difflib
import fcntl
import os
import re
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline import checkpoint
from pipeline.checkpoint import Checkpoint
from pipeline.config import Config, ConfigError
from pipeline.data.index import Index, build_index, load_index
from pipeline.data.sampling import steps_per_epoch
from pipeline.job import Event, Job
from pipeline.record import read_identity
from pipeline.settings import load
from pipeline.tracking import find_run_dir, tracking_uri

MAX_NAMED = 20  # refused files that are named one by one


@contextmanager
def prepare(cfg: Config, label: str, watch: Callable[[Event], None], resume_from: Path | None = None) -> Iterator[Job]:
    """Make or reopen the run that `cfg` describes, its name, directory and indexes, and hold it for this process.

    Args:
        label: what a run without a name is called, before the time.
        resume_from: a checkpoint to begin with, where the run has none.

    Raises:
        ConfigError: data that cannot be trained on, or another process that trains the run.
    """
    name = cfg.run.name or f"{label}-{time.strftime('%Y%m%d-%H%M%S')}"
    storage = Path(cfg.run.storage).absolute()
    train_source, val_source = Path(cfg.data.train).absolute(), Path(cfg.data.val).absolute()
    data = dataclasses.replace(cfg.data, train=str(train_source), val=str(val_source))
    run = dataclasses.replace(cfg.run, name=name, storage=str(storage))
    cfg = dataclasses.replace(cfg, run=run, data=data)
    run_dir = storage / name
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        os.utime(run_dir)  # as a write would, this fails where the file system is read-only
    except OSError as e:
        raise ConfigError(
            f"run.storage={storage}: cannot be written to ({e.strerror}); name another directory"
        ) from None
    with _held(run_dir):
        read_identity(run_dir)  # tells of damage before any worker is started
        train_index, train = _index(train_source, run_dir / "index" / "train.arrow", watch)
        val_index, val = _index(val_source, run_dir / "index" / "val.arrow", watch)
        val.with_classes(train.classes)
        try:
            steps_per_epoch(len(train), cfg.train.global_batch)
        except ValueError as e:
            raise ConfigError(str(e)) from None
        yield Job(cfg, run_dir, train_index, val_index, resume_from)


@contextmanager
def _held(run_dir: Path) -> Iterator[None]:
    """Keep other processes from training the run; the lock goes with the process, however it ends."""
    with (run_dir / "lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            raise ConfigError(
                f"run.name={run_dir.name}: is being trained by {file.read() or 'another process'}; wait for its end, "
                "or use another name"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def _index(source: Path, to: Path, watch: Callable[[Event], None]) -> tuple[Path, Index]:
    """The index of a folder, built anew into `to`, or the index file that `source` is."""
    if not source.is_dir():
        return source, load_index(source)
    index, refused = build_index(source)
    for one in refused[:MAX_NAMED]:
        watch({"kind": "warning", "text": f"left out {one}"})
    if len(refused) > MAX_NAMED:
        watch({"kind": "warning", "text": f"left out {len(refused) - MAX_NAMED} more; pipeline index lists them all"})
    index.save(to)
    return to, index


def find(reference: str, storage: Path, mlflow_uri: str | None) -> Checkpoint:
    """The checkpoint that a user means by a run's name, an MLflow run id, or a path.

    A run stands for its newest valid checkpoint.

    Args:
        storage: where runs lie.
        mlflow_uri: the store to look an MLflow run id up in; None is the usual one of `storage`.

    Raises:
        ConfigError: nothing of that name, or no valid checkpoint in it.
    """
    storage, path = storage.absolute(), Path(reference)
    if (path / checkpoint.META).exists():
        return _read(path.absolute())
    for run_dir in (storage / reference, path.absolute()):
        if (run_dir / "checkpoints").is_dir():
            return _newest(run_dir)
    if re.fullmatch(r"[0-9a-f]{32}", reference):  # the form of an MLflow run id
        logged = find_run_dir(tracking_uri(mlflow_uri, storage), reference)
        if logged is not None:
            return _newest(logged)
    known = sorted(p.parent.name for p in storage.glob("*/checkpoints"))
    near = difflib.get_close_matches(reference, known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"runs there: {', '.join(known[-5:]) or 'none'}"
    raise ConfigError(f"no run, MLflow run id or checkpoint {reference!r}; looked in {storage} ({hint})")


def config_to_resume(found: Checkpoint, overrides: list[str]) -> Config:
    """The configuration of a checkpoint's run, with overrides; at the place where it lies now.

    Raises:
        ConfigError: the run has a newer checkpoint, from which it would go on instead.
    """
    run_dir = found.path.parent.parent
    cfg = load(found.path / checkpoint.CONFIG, overrides)
    here: dict[str, Any] = {"storage": str(run_dir.parent), "name": run_dir.name, "stop_at_step": None}
    given = {o.partition("=")[0] for o in overrides}
    run = dataclasses.replace(cfg.run, **{k: v for k, v in here.items() if f"run.{k}" not in given})
    cfg = dataclasses.replace(cfg, run=run)
    newest = _newest(run_dir)
    if newest.path != found.path and Path(cfg.run.storage, cfg.run.name or "").absolute() == run_dir:
        raise ConfigError(
            f"{found.path} is not the newest checkpoint of its run, {newest.path.name} is; "
            "to branch off from it, give the branch a name: run.name=NAME"
        )
    return cfg


def _read(path: Path) -> Checkpoint:
    try:
        return checkpoint.read(path)
    except checkpoint.CheckpointError as e:
        raise ConfigError(str(e)) from None


def _newest(run_dir: Path) -> Checkpoint:
    problems: list[str] = []
    found = checkpoint.newest_valid(run_dir / "checkpoints", problems.append)
    if found is None:
        raise ConfigError(f"{run_dir} has no valid checkpoint" + (f": {problems[0]}" if problems else " yet"))
    return found
