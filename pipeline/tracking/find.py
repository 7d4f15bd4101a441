"""Finding a run or a checkpoint again, by what a user calls it: a name, an MLflow run id, a path or a URI."""

import dataclasses
import difflib
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.config.fields import refuse_credentials
from pipeline.config.loading import load_saved
from pipeline.config.schema import Config
from pipeline.errors import UserError
from pipeline.failures import CheckpointError
from pipeline.runs import checkpoint
from pipeline.runs.checkpoint import Checkpoint
from pipeline.runs.manifest import FILE, RunManifest
from pipeline.runs.spec import CHECKPOINTS
from pipeline.storage import Storage
from pipeline.tracking import mlflow_run
from pipeline.tracking.mlflow_store import moved_config, tracking_uri

MLFLOW_RUN_ID = re.compile(r"[0-9a-f]{32}")
MAX_NAMED = 5  # runs


def open_storage(uri: str) -> Storage:
    """The storage at a path or URI.

    Raises:
        UserError: a URI that pyarrow does not know, or with a secret in it, which would be logged.
    """
    storage = Storage(uri)
    refuse_credentials("run.storage", uri)
    try:
        storage.check()
    except ValueError as e:
        raise UserError(f"run.storage={uri}: {str(e).splitlines()[0]}; use a directory, s3://... or gs://...") from None
    return storage


def find_run(reference: str, storage: Storage, mlflow_uri: str | None) -> Storage:
    """The folder of a run that is meant by its name, its MLflow run id, a path or a URI.

    Raises:
        UserError: there is none; with the nearest name.
    """
    for run in (storage / reference, Storage(reference)) if "://" not in reference else (Storage(reference),):
        if {CHECKPOINTS, FILE} & set(run.names()):
            return run
    also = ""
    if MLFLOW_RUN_ID.fullmatch(reference):
        uri = tracking_uri(mlflow_uri, storage)
        if (logged := mlflow_run.find_run(uri, reference)) is not None:
            return logged
        also = f" and in MLflow at {uri}; name another store with --mlflow-uri (pipeline train: mlflow.uri)"
    known = [name for name in storage.names() if FILE in (storage / name).sizes()]
    near = difflib.get_close_matches(reference, known, n=1)
    more = f" and {len(known) - MAX_NAMED} others" if len(known) > MAX_NAMED else ""
    hint = f"did you mean {near[0]}?" if near else f"runs there: {', '.join(known[-MAX_NAMED:]) or 'none'}{more}"
    raise UserError(f"no run, MLflow run id or checkpoint {reference!r}; looked in {storage} ({hint}){also}")


def find_checkpoint(
    reference: str, storage: Storage, mlflow_uri: str | None, warn: Callable[[str], None] = lambda _: None
) -> Checkpoint:
    """The checkpoint that a user means by a run's name, an MLflow run id, a path or a URI.

    A run stands for its newest valid checkpoint.

    Args:
        storage: where runs lie.
        mlflow_uri: the store to look an MLflow run id up in; None is the usual one of `storage`.
        warn: told of newer checkpoints that are damaged.

    Raises:
        UserError: nothing of that name, or no valid checkpoint in it.
    """
    if checkpoint.META in (place := Storage(reference)).sizes():
        with _as_user_error():
            return checkpoint.load(place)
    return _newest(find_run(reference, storage, mlflow_uri), warn)


def find_weights(reference: str, storage: Storage, mlflow_uri: str | None) -> str:
    """URI of the weight file or the checkpoint that model.weights means.

    Raises:
        UserError: there is neither.
    """
    place = Storage(reference)
    if place.name in place.parent.sizes():
        return place.uri
    try:
        return find_checkpoint(reference, storage, mlflow_uri).place.uri
    except UserError as e:
        raise UserError(f"model.weights={reference}: no such file, and {e}") from None


def find_to_resume(
    reference: str, storage_uri: str | None, mlflow_uri: str | None, warn: Callable[[str], None]
) -> Checkpoint:
    """As `find_checkpoint`; where an MLflow run's folder is lost, its newest valid checkpoint among MLflow's artifacts.

    Args:
        storage_uri: where runs lie, and where the run is to lie again; None: "runs", and where it was.
        warn: told of damaged artifacts.
    """
    storage = open_storage(storage_uri or "runs")
    run = find_run(reference, storage, mlflow_uri) if MLFLOW_RUN_ID.fullmatch(reference) else None
    if run is None or (run / CHECKPOINTS).names():
        return find_checkpoint(reference, storage, mlflow_uri)
    place = storage / run.name if storage_uri else run
    _fetch(place, tracking_uri(mlflow_uri, storage), reference, warn)
    return _newest(place)


def _fetch(run: Storage, uri: str, mlflow_id: str, warn: Callable[[str], None]) -> None:
    """Put the newest valid checkpoint that MLflow has into the run's folder; it says which training the run is."""
    problems: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        for path in mlflow_run.fetch_checkpoints(uri, mlflow_id, Path(folder)):
            try:
                fetched = checkpoint.load(Storage(path))
            except CheckpointError as e:
                warn(f"of MLflow's artifacts: {e}")
                problems.append(str(e))
                continue
            there = RunManifest.read(run, warn)
            if there is not None and there.training_id != fetched.meta["training_id"]:
                raise UserError(
                    f"run.storage={run.parent}: already has another training named {run.name}; use another run.storage"
                )
            place = run / CHECKPOINTS / path.name
            place.make()
            for file in (checkpoint.STATE, checkpoint.CONFIG, checkpoint.META):  # the last makes it one
                place.upload(fetched.path / file if file == checkpoint.META else fetched.file(file), file)
            return
    problems.append("mlflow.checkpoints=all uploads each one, best and last upload theirs when an attempt ends")
    raise UserError(
        f"{run} is gone, and MLflow run {mlflow_id} has no valid checkpoint among its artifacts: {problems[0]}"
    )


def config_to_resume(resume_from: Checkpoint, overrides: list[str]) -> Config:
    """The configuration of a checkpoint's run, with overrides; at the place where it lies now.

    Raises:
        UserError: the run has a newer checkpoint, from which it would go on instead.
    """
    run = resume_from.place.parent.parent
    # One change that was allowed is no leave for the next one.
    cfg = load_saved(resume_from.file(checkpoint.CONFIG), ["data.allow_changed=false", *overrides])
    here: dict[str, Any] = {"storage": run.parent.uri, "name": run.name, "stop_at_step": None}
    given = {override.partition("=")[0] for override in overrides}
    settings = dataclasses.replace(cfg.run, **{k: v for k, v in here.items() if f"run.{k}" not in given})
    newest = _newest(run)
    same_run = (Storage(settings.storage) / (settings.name or "")).uri == run.uri
    if newest.step != resume_from.step and same_run:
        raise UserError(
            f"{resume_from.place} is not the newest checkpoint of its run, {newest.place.name} is; "
            "to branch off from it, give the branch a name: run.name=NAME"
        )
    tracked = cfg.mlflow if "mlflow.uri" in given else moved_config(cfg.mlflow, resume_from.cfg.run.storage, run.parent)
    return dataclasses.replace(cfg, run=settings, mlflow=tracked)


@contextmanager
def _as_user_error() -> Iterator[None]:
    try:
        yield
    except CheckpointError as e:
        raise UserError(str(e)) from None


def _newest(run: Storage, warn: Callable[[str], None] = lambda _: None) -> Checkpoint:
    problems: list[str] = []
    with _as_user_error():
        newest = checkpoint.newest_valid(run / CHECKPOINTS, problems.append)
    if newest is None:
        raise UserError(f"{run} has no valid checkpoint" + (f": {problems[0]}" if problems else " yet"))
    for problem in problems:
        warn(problem)
    return newest
