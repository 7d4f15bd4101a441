"""New MLflow stores for tests: copies of a first one, since MLflow's migrations take seconds and hundreds of fsyncs."""

import sqlite3
from contextlib import closing
from typing import Any

from mlflow.store.db import utils
from sqlalchemy import inspect

_migrate = utils._initialize_tables
_made = b""


def _initialize_tables(engine: Any) -> None:
    """As MLflow's own, of which the first store of a process is made."""
    global _made
    if engine.dialect.name != "sqlite" or not engine.url.database or inspect(engine).get_table_names():
        _migrate(engine)
    elif not _made:
        _migrate(engine)
        with closing(sqlite3.connect(engine.url.database)) as store:
            _made = store.serialize()
    else:
        with closing(sqlite3.connect(":memory:")) as source, closing(sqlite3.connect(engine.url.database)) as store:
            source.deserialize(_made)
            source.backup(store)


def copy_instead_of_migrating() -> None:
    utils._initialize_tables = _initialize_tables
