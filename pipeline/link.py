"""The actor between the driver and its workers. On its own, so that its process imports little and starts fast."""

import time

from pipeline.job import Event, FailureBudget, Fault, StopReason


class Link:
    """Events go one way, the wish to stop the other; in between it knows how the workers fare.

    Each group of workers is a new attempt. A worker of an earlier one, cut off and not yet dead, is not heard.
    """

    def __init__(self, max_failures: int, faults: tuple[Fault, ...]):
        self._budget, self._faults = FailureBudget(max_failures), list(faults)
        self._events: list[Event] = []
        self._attempt, self._step = 0, 0
        self._nodes: dict[int, str] = {}
        self._stop: StopReason | None = None
        self._fatal: tuple[str, str] | None = None

    def join(self, rank: int, node: str) -> tuple[int, tuple[Fault, ...]] | None:
        """A worker starts on a node. Returns its attempt and the faults before it, or None: it is to end."""
        if self._fatal:
            return None
        if rank > 0:
            self._nodes[rank] = node
            return self._attempt, ()
        self._attempt += 1
        self._nodes = {0: node}
        self._stop = self._stop if self._stop == "interrupted" else None
        faults, self._faults = tuple(self._faults), []
        return self._attempt, faults

    def emit(self, attempt: int | None, event: Event) -> None:
        if attempt not in (None, self._attempt):
            return
        if event["kind"] == "checkpoint":
            self._budget.progressed()
        self._events.append(event)

    def poll(self, attempt: int, step: int) -> StopReason | None:
        """What rank 0 asks for time and again, telling the steps done."""
        if attempt == self._attempt:
            self._step = step
        return self._stop

    def take_events(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    def nodes(self) -> set[str]:
        """Where the workers run."""
        return set(self._nodes.values())

    def request_stop(self, reason: StopReason) -> None:
        if self._stop != "interrupted":
            self._stop = reason

    def failed(self, text: str) -> None:
        """A worker has failed, and the group will start anew, unless that happens too often."""
        self._faults.append(Fault(text, self._step, time.time()))
        self._events.append({"kind": "fault", "text": text})
        if self._budget.failed():
            self.fail("TrainingFailedError", f"{text}; too many failures without a checkpoint in between")

    def fail(self, kind: str, text: str) -> None:
        """An error that a new start would meet again."""
        self._fatal = self._fatal or (kind, text)

    def fatal(self) -> tuple[str, str] | None:
        return self._fatal
