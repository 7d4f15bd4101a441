"""Sending what waits for MLflow without training: `pipeline sync`."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

from pipeline.errors import UserError
from pipeline.runs.claim import Claim
from pipeline.runs.manifest import RunManifest
from pipeline.storage import Storage
from pipeline.tracking import backlog, outbox
from pipeline.tracking.mlflow_logger import FOLDER, TARGET, MlflowLogger
from pipeline.tracking.mlflow_run import Target
from pipeline.tracking.mlflow_store import moved_uri


def sync(run: Storage, warn: Callable[[str], None], timeout_s: float = 10.0) -> tuple[Target, str | None, int]:
    """Send what waits for MLflow of the run in a folder: on this machine, and of one on an object store there.

    A last attempt that has not told of its end was killed, which MLflow is told.

    Args:
        timeout_s: how long to go on trying an MLflow that fails.

    Returns:
        What it is for, the MLflow run's id, and how many records still wait.

    Raises:
        UserError: nothing waits, or on an object store, where the run may be trained from another machine just now.
        OSError: the storage does not answer.
    """
    claim, last = Claim.last(run), RunManifest.read(run, warn)
    folder, is_open = run.local_dir / FOLDER, last is not None and last.open
    saved = None if run.local else backlog.read(run)
    if outbox.is_in_use(folder) or (is_open and saved and saved.owner != outbox.read_id(folder)):
        raise UserError(
            f"{run} may still be in training: its last attempt has not reported its end; if nothing trains it, "
            f"resume it, which also sends what waits: pipeline train --resume {run}"
        )
    target = saved.target if saved else _target(folder / TARGET)
    if target is None:
        raise UserError(f"{folder} holds nothing that waits for MLflow")
    target = _moved(target, run)
    logger = MlflowLogger(target, folder, warn, claim)  # a training that begins now sends what is left
    if saved:
        logger.take_backlog(saved.name)
    waiting = logger.close("KILLED" if is_open else None, timeout_s)
    return target, logger.run_id, waiting


def _target(file: Path) -> Target | None:
    try:
        return Target(**json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _moved(target: Target, run: Storage) -> Target:
    """Where the run is logged now: its storage may have been moved, and a SQLite store with it."""
    uri = moved_uri(target.uri, Storage(target.run).parent, run.parent)
    return dataclasses.replace(target, uri=uri, run=run.uri)
