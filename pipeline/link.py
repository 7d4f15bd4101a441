"""The actor between the driver and its workers. On its own, so that its process imports little and starts fast."""

from pipeline.job import Event


class Link:
    """The actor between the driver and its workers: events one way, the wish to stop the other."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._stop = False
        self._fatal: tuple[str, str] | None = None

    def emit(self, event: Event) -> None:
        self._events.append(event)

    def take_events(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    def request_stop(self) -> None:
        self._stop = True

    def should_stop(self) -> bool:
        return self._stop

    def fail(self, kind: str, text: str) -> None:
        self._fatal = self._fatal or (kind, text)

    def fatal(self) -> tuple[str, str] | None:
        return self._fatal
