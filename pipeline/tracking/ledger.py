"""Where the time goes: a ledger that splits a training's wall time into phases without overlap."""

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:  # torch takes seconds to import, and the user's own process does without it
    import torch

T = TypeVar("T")
COMPUTE = ("forward", "backward", "optimizer")  # a training's useful work
STEP = ("compile", *COMPUTE, "data wait", "communication wait", "logging")  # what is counted for images/s
# Of all that the ledger knows, in the order in which people read it.
PHASES = (
    *("start-up", "compile", "data wait", "compute", "communication wait"),
    *("checkpoint", "evaluation", "logging", "recovery", "shut-down"),
)


class Reading:
    """Seconds per phase up to a mark, once the device has come to it."""

    def __init__(self, ledger: "TimeLedger", mark: tuple[str, Any]):
        self._ledger, self.mark = ledger, mark
        self.seconds: dict[str, float] = {}

    def wait(self) -> dict[str, float]:
        """The seconds; waits for the device."""
        if not isinstance(event := self.mark[1], float):
            event.synchronize()
        self._ledger.count_ended()
        return self.seconds


class TimeLedger:
    """Seconds per phase, over all attempts of a training. Phases nest: an inner one's time is not the outer one's.

    On a GPU the clock is its stream's: a phase lasts from when the device comes to its first mark to when it comes to
    the next one. So waiting for data counts only where the device ran dry, and computing where it computes. The marks
    are events, read once the device has come to them.

    Args:
        phase: what the time from now on is counted to.
        device: whose clock it is; None: the CPU.
        before: seconds per phase that are counted already.
    """

    def __init__(self, phase: str, device: "torch.device | None" = None, before: Mapping[str, float] | None = None):
        self._seconds = dict(before or {})
        self._now = _event if device is not None and device.type == "cuda" else time.perf_counter
        self._marks: deque[tuple[str, Any]] = deque([(phase, self._now())])  # what is not counted yet
        self._readings = deque[Reading]()  # that the device has not come to
        self.compiling = False  # the step that is under way compiles the network
        self.listener: Callable[[str], None] | None = None  # told of each phase that begins

    def start_phase(self, name: str) -> str:
        """Count the time from now on to `name`; return what was counted until now. It costs a microsecond or less."""
        previous = self._marks[-1][0]
        self._marks.append(
            ("compile" if self.compiling and name in (*COMPUTE, "communication wait") else name, self._now())
        )
        if self.listener is not None and name != previous:
            self.listener(name)
        return previous

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time inside to `name`."""
        outer = self.start_phase(name)
        try:
            yield
        finally:
            self.start_phase(outer)

    def steps(self, batches: Iterator[T], compiles: Callable[[T], bool] = lambda _: False) -> Iterator[T]:
        """`batches`, with the time that each is waited for as "data wait", and the first one's left where it was.

        Args:
            compiles: whether a batch's step compiles the network; it is counted as that.
        """
        for batch in batches:
            self.compiling = compiles(batch)
            self.start_phase("forward")
            yield batch
            self.compiling = False
            self.start_phase("data wait")
            self.count_ended()

    def seconds(self) -> dict[str, float]:
        """Per phase, up to now. On a GPU this waits for the device."""
        return self.read_later().wait()

    def read_later(self) -> Reading:
        """The seconds per phase up to now, to be waited for at another time."""
        self.start_phase(self._marks[-1][0])
        self._readings.append(reading := Reading(self, self._marks[-1]))
        return reading

    def count_ended(self) -> None:
        """Count the phases that are over; a device is some steps behind, and a week's marks must not gather."""
        while len(self._marks) > 1 and _is_over(self._marks[1][1]):
            name, began = self._marks.popleft()
            self._seconds[name] = self._seconds.get(name, 0.0) + _between(began, self._marks[0][1])
            if self._readings and self._readings[0].mark is self._marks[0]:
                self._readings.popleft().seconds = dict(self._seconds)


def _event() -> "torch.cuda.Event":
    import torch

    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


def _is_over(mark: Any) -> bool:
    """Whether the device has come to it."""
    return isinstance(mark, float) or bool(mark.query())


def _between(began: Any, ended: Any) -> float:
    """Seconds between two marks that are over."""
    return float(ended - began) if isinstance(began, float) else float(began.elapsed_time(ended)) / 1000


def total(seconds: Mapping[str, float], *names: str) -> float:
    """Seconds in these phases."""
    return sum(seconds.get(name, 0.0) for name in names)


def images_per_s(num_images: int, seconds: Mapping[str, float], before: Mapping[str, float]) -> float | None:
    """The speed of the steps that were done between two readings of a ledger; None: there were none."""
    return num_images / (total(seconds, *STEP) - total(before, *STEP)) if num_images else None


def speeds(num_images: int, seconds: Mapping[str, float], before: Mapping[str, float]) -> dict[str, float]:
    """Metrics of the images that were trained on between two readings."""
    step_s = total(seconds, *STEP) - total(before, *STEP)
    waited_s = total(seconds, "data wait") - total(before, "data wait")
    return {"perf/images_per_s": num_images / step_s, "perf/data_wait_share": waited_s / step_s}


def summed_up(seconds: Mapping[str, float]) -> dict[str, float]:
    """As people read it: each of PHASES, a step's own work together as "compute"."""
    grouped = dict.fromkeys(PHASES, 0.0)
    for name, s in seconds.items():
        grouped["compute" if name in COMPUTE else name] += s
    return grouped


def for_mlflow(seconds: Mapping[str, float]) -> dict[str, float]:
    """Metrics of the ledger up to now, over all attempts."""
    names = {phase: f"time/{phase.replace(' ', '_').replace('-', '_')}_s" for phase in PHASES if phase != "shut-down"}
    grouped = summed_up(seconds)
    return {"perf/goodput": goodput(seconds)} | {name: grouped[phase] for phase, name in names.items()}


def goodput(seconds: Mapping[str, float]) -> float:
    """The share of all time that was spent on computing steps that count."""
    return summed_up(seconds)["compute"] / sum(seconds.values())
