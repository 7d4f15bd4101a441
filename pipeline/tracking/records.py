"""What MLflow is to get, as records: each is a line of a file, a JSON object with its kind."""

import json
from dataclasses import dataclass, replace
from typing import get_args


@dataclass(frozen=True)
class Start:
    """An attempt has begun, in the process that `attempt` names."""

    attempt: str


@dataclass(frozen=True)
class End:
    """An attempt has ended. status: FINISHED, KILLED (to be resumed) or FAILED."""

    status: str


@dataclass(frozen=True)
class Params:
    values: dict[str, str]


@dataclass(frozen=True)
class Tags:
    values: dict[str, str]


@dataclass(frozen=True)
class Metrics:
    """Of one step. time: Unix, in ms."""

    step: int
    time: int
    values: dict[str, float]

    def after(self, last_step: dict[str, int]) -> "Metrics":
        """Without those that have been logged up to this step or a later one."""
        return replace(self, values={k: v for k, v in self.values.items() if self.step > last_step.get(k, -1)})


@dataclass(frozen=True)
class Text:
    """The artifact file `to`."""

    text: str
    to: str


@dataclass(frozen=True)
class Folder:
    """Files that go below the artifact path `to`; staged: the name of their folder, see `Staging`."""

    staged: str
    to: str


@dataclass(frozen=True)
class Report:
    """A report to be made of the facts in a folder; staged: its name, see `Staging`."""

    staged: str


@dataclass(frozen=True)
class Model:
    """A checkpoint's model. checkpoint: its name in the run. register: a name in the Model Registry, if any."""

    checkpoint: str
    register: str | None


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
