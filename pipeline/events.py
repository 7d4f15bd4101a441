"""What happens in a training, for programs: the console, the gauges, and whoever counts its failures.

Workers send events to the driver, and the driver sends them on to the process that the user started.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, get_args


@dataclass(frozen=True)
class RunOpened:
    """Its name, and the path or URI of its folder."""

    name: str
    place: str


@dataclass(frozen=True)
class AttemptStarted:
    """All workers are ready.

    attempt: its number in the run. step: it goes on from there. num_steps: of the whole training. device: "cpu" or
    "cuda". startup: seconds of each part of its start. failures: of the run so far. lost_steps, recovery_s: steps to do
    again, and seconds since the failure before it, if there was one. compilation: see `CompileDecision`.
    """

    attempt: int
    step: int
    num_steps: int
    global_batch: int
    resumed_from: str | None
    world_size: int
    num_threads: int
    device: str
    precision: str
    precision_reason: str
    startup: dict[str, float]
    failures: int
    lost_steps: int | None = None
    recovery_s: float | None = None
    compilation: str = ""


@dataclass(frozen=True)
class StepLogged:
    """metrics: as MLflow has them. seconds: of the training so far, by phase."""

    step: int
    metrics: dict[str, float]
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluated:
    """scores: "top1", "top5", "loss", "count", ..."""

    step: int
    scores: dict[str, float]


@dataclass(frozen=True)
class CheckpointWritten:
    step: int
    place: str  # path or URI


@dataclass(frozen=True)
class AttemptFailed:
    text: str


@dataclass(frozen=True)
class Resizing:
    """Workers come or go: the attempt ends with a checkpoint, and another one begins. text: why."""

    text: str


@dataclass(frozen=True)
class AttemptEnded:
    """Rank 0 has ended an attempt whose other ranks may be in the midst of a step; its summary, as `fit` returns it."""

    summary: dict[str, Any]


@dataclass(frozen=True)
class Stopping:
    """The user has asked for an end, by a signal of this name."""

    signal: str


@dataclass(frozen=True)
class ImageSearchStarted:
    """Workers look for images that crash the process that decodes them."""

    text: str


@dataclass(frozen=True)
class CrashingImageFound:
    """It is left out from now on; a uniform image takes its place."""

    path: str
    reason: str

    @property
    def text(self) -> str:
        return f"{self.path}: {self.reason}; a uniform image takes its place"


@dataclass(frozen=True)
class BrokenImage:
    """One that this process has met; a uniform image takes its place. path: of its file. reason: what is wrong."""

    path: str
    reason: str

    @property
    def text(self) -> str:
        return f"{self.path} is broken, a uniform image takes its place: {self.reason}"


@dataclass(frozen=True)
class Note:
    """A line for the user."""

    text: str


@dataclass(frozen=True)
class Warned:
    """A line for the user about what is not as it should be."""

    text: str


Event = (
    RunOpened
    | AttemptStarted
    | StepLogged
    | Evaluated
    | CheckpointWritten
    | AttemptFailed
    | Resizing
    | AttemptEnded
    | Stopping
    | ImageSearchStarted
    | CrashingImageFound
    | BrokenImage
    | Note
    | Warned
)
_BY_NAME: dict[str, type[Event]] = {kind.__name__: kind for kind in get_args(Event)}


def to_json(event: Event) -> dict[str, Any]:
    """As `from_json` takes it; its values may be numpy's numbers."""
    return {"event": type(event).__name__, **dataclasses.asdict(event)}


def from_json(content: dict[str, Any]) -> Event:
    return _BY_NAME[content["event"]](**{name: value for name, value in content.items() if name != "event"})
