"""The MLflow store that runs are logged to: its address, and a client of it."""

import dataclasses
import logging
import os
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

from pipeline.config.fields import refuse_credentials
from pipeline.config.running import MlflowConfig
from pipeline.config.schema import Config
from pipeline.environment import SQLITE
from pipeline.errors import UserError
from pipeline.local_files import alone
from pipeline.storage import Storage

ARTIFACTS = "mlartifacts"  # a folder beside a SQLite store
PLACES = (  # where such a store has paths of artifacts: table, column
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "storage_location"),
)


def tracking_uri(configured: str | None, storage: Storage) -> str:
    """Where runs are logged: as configured, else $MLFLOW_TRACKING_URI, else a SQLite file in `storage`.

    Raises:
        UserError: none of these, or one with a login in it.
    """
    if named := configured or os.environ.get("MLFLOW_TRACKING_URI"):
        refuse_credentials("MLFLOW_TRACKING_URI", named)
        return absolute(named)
    if storage.local is None:
        raise UserError(f"mlflow.uri=null: run.storage={storage} cannot hold MLflow's database; name a server")
    return store_beside(storage)


def store_beside(storage: Storage) -> str:
    """The SQLite store of the runs in a directory that names no other."""
    assert storage.local is not None, "no object store can hold a database"
    return f"{SQLITE}{storage.local / 'mlflow.db'}"


def absolute(uri: str) -> str:
    """A store's address that holds in every directory: Ray's workers run in others."""
    file = uri.removeprefix(SQLITE)
    return uri if file == uri or file.startswith("/") else f"{SQLITE}{Path(file).absolute()}"


def with_absolute_uri(cfg: Config) -> Config:
    """A configuration for processes that work in other directories."""
    uri = cfg.mlflow.uri and absolute(cfg.mlflow.uri)
    return dataclasses.replace(cfg, mlflow=dataclasses.replace(cfg.mlflow, uri=uri))


def moved_uri(uri: str, before: Storage, now: Storage) -> str:
    """A store's address after the folder `before` was moved, or copied, to `now`.

    It is another one where it is a SQLite store somewhere in there, unless the folder was moved without it.
    """
    file = Path(uri.removeprefix(SQLITE))
    if not (before.local and now.local and uri.startswith(SQLITE) and file.is_relative_to(before.local)):
        return uri
    here = f"{SQLITE}{now.local / file.relative_to(before.local)}"
    return here if is_missing(uri) or not is_missing(here) else uri


def moved_config(cfg: MlflowConfig, before: str, now: Storage) -> MlflowConfig:
    """The same for the configuration of a run, whose storage was `before`, a path or URI."""
    return dataclasses.replace(cfg, uri=cfg.uri and moved_uri(absolute(cfg.uri), Storage(before), now))


def open_client(uri: str) -> Any:
    """MLflow's client of a store.

    Raises:
        Exception: MLflow raises whatever its transport raises.
    """
    # MLflow's own retries (7, of up to 120 s each) would hide for minutes that a server is away; and where the answer
    # to "make a run" is lost, a second try makes a second one. `MlflowLogger` tries again, and looks for the first.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # where the JSON of a command goes
    import mlflow

    if not uri.startswith(SQLITE):
        return mlflow.MlflowClient(uri)
    logging.getLogger("mlflow.store.db").setLevel(logging.WARNING)  # each new database is told of in two lines
    (folder := Path(uri.removeprefix(SQLITE)).parent).mkdir(parents=True, exist_ok=True)
    with alone(folder):  # two that make its tables break it for good (MLflow 3.17)
        client = mlflow.MlflowClient(uri)
        client.search_experiments(max_results=1)  # makes them, where there are none
    return client


def follow_artifacts(database: Path, old: str, new: str) -> None:
    """Have a SQLite store look for its artifacts at `new`, where it was moved or copied from elsewhere with them.

    Args:
        old: where it has them, a path or a URI. Left as it is where it is no folder beside a store, and where it is
            there and has what the new one lacks.
    """
    was, now = Path(old.removeprefix("file://")), Path(new)
    if was.name != ARTIFACTS or not now.is_dir() or (was.is_dir() and was.samefile(now)):
        return
    if was.is_dir() and not {path.name for path in was.iterdir()} <= {path.name for path in now.iterdir()}:
        return
    with alone(database.parent), closing(sqlite3.connect(database, timeout=60)) as store, store:
        for table, column in PLACES:
            store.execute(
                f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE {column} = ? OR instr({column}, ?) = 1",
                (new, len(old) + 1, old, f"{old}/"),
            )


def is_missing(uri: str) -> bool:
    """Whether it is a SQLite store that MLflow would make."""
    return uri.startswith(SQLITE) and not Path(uri.removeprefix(SQLITE)).exists()


def reason(error: Exception) -> str:
    """What went wrong, in a line for the user."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
    if getattr(error, "error_code", None) in {"UNAUTHENTICATED", "PERMISSION_DENIED"}:
        text += "; set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD to a login of that server"
    return text
