"""What MLflow is to get, as records: each is a line of a file, a JSON object with its kind."""

import json
from dataclasses import dataclass, replace
from typing import get_args


@dataclass(frozen=True)
class Start:
    attempt: str  # the process that has begun it


@dataclass(frozen=True)
class End:
    status: str  # FINISHED, KILLED (to be resumed) or FAILED


@dataclass(frozen=True)
class Params:
    values: dict[str, str]


@dataclass(frozen=True)
class Tags:
    values: dict[str, str]


@dataclass(frozen=True)
class Metrics:
    step: int
    time: int  # Unix, in ms
    values: dict[str, float]

    def after(self, last_step: dict[str, int]) -> "Metrics":
        """Without those that have been logged up to this step or a later one."""
        return replace(self, values={k: v for k, v in self.values.items() if self.step > last_step.get(k, -1)})


@dataclass(frozen=True)
class Text:
    text: str
    to: str  # path of the artifact


@dataclass(frozen=True)
class Folder:
    staged: str  # name of the folder with its files, see `Staging`
    to: str  # path of the artifacts


@dataclass(frozen=True)
class Report:
    staged: str  # name of the folder with its facts


@dataclass(frozen=True)
class Model:
    checkpoint: str  # its name in the run
    register: str | None  # name in the Model Registry, if any


Staged = Folder | Report  # of files that are on this machine alone
Record = Start | End | Params | Tags | Metrics | Text | Model | Staged
KINDS: dict[str, type[Record]] = {kind.__name__.lower(): kind for kind in get_args(Record)}


def to_line(record: Record) -> bytes:
    return json.dumps({"kind": type(record).__name__.lower(), **vars(record)}).encode() + b"\n"


def from_line(line: bytes) -> Record | None:
    """None for a line that is damaged, or no record of this version."""
    try:
        fields = json.loads(line)
        return KINDS[fields.pop("kind")](**fields)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def parse_lines(content: bytes) -> tuple[list[bytes], list[Record]]:
    """The whole lines, and the records of those that are sound."""
    lines = content.rpartition(b"\n")[0].splitlines()  # a killed process may leave half a line
    return lines, [record for line in lines if (record := from_line(line)) is not None]
