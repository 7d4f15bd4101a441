"""The actor between the driver and its workers. On its own, so that its process imports little and starts fast."""

from pipeline.job import Event, StopReason, Work


class Link:
    """Events go one way, the wish to stop the other.

    Each session is a new attempt. A worker of an earlier one, cut off and not yet dead, is not heard.
    """

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._attempt, self._step = 0, 0
        self._nodes: set[str] = set()
        self._stop: StopReason | None = None
        self._fatal: tuple[str, str] | None = None
        self._work: Work | None = None

    def begin(self, attempt: int) -> None:
        self._attempt, self._nodes, self._stop, self._work = attempt, set(), None, None

    def give(self, attempt: int, work: Work) -> None:
        """Tell the workers what they are to do."""
        if attempt == self._attempt:
            self._work = work

    def work(self, attempt: int) -> Work | None:
        """What a worker is to do; None while that is not known."""
        return self._work if attempt == self._attempt else None

    def join(self, attempt: int, node: str) -> None:
        """A worker has started on a node."""
        if attempt == self._attempt:
            self._nodes.add(node)

    def nodes(self) -> set[str]:
        """Where workers run."""
        return self._nodes

    def emit(self, attempt: int, event: Event) -> None:
        if attempt == self._attempt:
            self._events.append(event)

    def take_events(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    def poll(self, attempt: int, step: int) -> StopReason | None:
        """What rank 0 asks for time and again, telling the steps done."""
        if attempt == self._attempt:
            self._step = step
        return self._stop

    def step(self) -> int:
        """The last step known to be done."""
        return self._step

    def request_stop(self, reason: StopReason) -> None:
        if self._stop != "interrupted":
            self._stop = reason

    def fail(self, attempt: int, kind: str, text: str) -> None:
        """An error that a new start would meet again."""
        if attempt == self._attempt:
            self._fatal = self._fatal or (kind, text)

    def fatal(self) -> tuple[str, str] | None:
        return self._fatal
