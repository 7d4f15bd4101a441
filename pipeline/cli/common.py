"""What all commands share: their outcome, their common options, and how they talk to people."""

import os
import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import IO, TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter, Token

from pipeline.errors import UserError

if TYPE_CHECKING:  # torch takes seconds to import
    from pipeline.config import schema
    from pipeline.runs.checkpoint import Checkpoint

DONE, FAILED, WRONG, INTERRUPTED = 0, 1, 2, 130
Outcome = tuple[Any, list[str], int]  # for --json, for people, exit code

SOURCES = "A folder of CLASS/image files, of tar shards or of Parquet files; or DIR/train-{000..146}.tar; a path or URI"


def whole(low: int) -> Any:
    """Converts an option's text to a whole number of at least `low`."""

    def convert(_: Any, tokens: Sequence[Token]) -> int:
        text = tokens[0].value
        if not text.isdecimal() or int(text) < low:
            raise UserError(f"{text}: must be a whole number, at least {low}")
        return int(text)

    return convert


def variables(_: Any, tokens: Sequence[Token]) -> list[str]:
    """Environment variables' names, of an option that takes no values; what else was given is not repeated."""
    if any(re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", token.value) is None for token in tokens):
        raise UserError("give the name of an environment variable, without its value")
    return [token.value for token in tokens]


# The options that several commands have.
Json = Annotated[bool, Parameter(name="--json", help="One JSON object on stdout, all else on stderr.")]
Config = Annotated[str, Parameter(name="CONFIG")]
Overrides = Annotated[
    str, Parameter(name="KEY=VALUE", help="Settings, such as train.epochs=3; `pipeline config --explain` lists all.")
]
Run = Annotated[str, Parameter(name="RUN", help="A run's name, an MLflow run id, or a checkpoint's path.")]
Storage = Annotated[str, Parameter(help="The directory or URI where runs lie.")]
MlflowUri = Annotated[str | None, Parameter(help="The store that an MLflow run id is looked up in.")]
RunData = Annotated[str | None, Parameter(help=f"{SOURCES}, or an index; by default the run's own val.")]
Address = Annotated[
    str | None,
    Parameter(help="Of the cluster's dashboard, such as http://HEAD:8265; by default $RAY_API_SERVER_ADDRESS."),
]
Count = Annotated[int, Parameter(converter=whole(1))]
Variables = Annotated[list[str] | None, Parameter(converter=variables)]
CountFrom0 = Annotated[int, Parameter(converter=whole(0))]


def load(config: str | None, overrides: Sequence[str]) -> "schema.Config":
    """The configuration that a command's CONFIG and KEY=VALUE mean; OmegaConf is imported here, not for `--help`."""
    from pipeline.config import loading

    return loading.load(config, overrides)


def checkpoint_of(run: str, storage: str, mlflow_uri: str | None) -> "Checkpoint":
    """The checkpoint that a command's RUN means."""
    from pipeline.tracking import find

    return find.find_checkpoint(run, find.open_storage(storage), mlflow_uri, lambda text: warn(f"warning: {text}"))


def drop_unread() -> None:
    """Where the reader of stdout or stderr has gone, forget what waits for it: Python would end with 120 for it."""
    for stream in filter(None, (sys.stdout, sys.stderr)):  # None: it was closed from the start
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def warn(text: str) -> None:
    """Tell people, whatever goes to stdout; where nobody reads it, that ends nothing."""
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def people(as_json: bool) -> IO[str]:
    """Where what is meant for people goes: beside the JSON, not into it."""
    return sys.stderr if as_json else sys.stdout
