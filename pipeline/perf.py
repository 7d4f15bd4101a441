"""Where the time goes: a ledger that splits a run's wall time into phases without overlap."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


class Ledger:
    """Seconds per phase. Phases nest: an inner phase's time is not the outer one's.

    Time is the host's: on a GPU, work that was queued counts where the host waits for it.
    """

    def __init__(self, phase: str):
        self.seconds: dict[str, float] = {}
        self._phase, self._since = phase, time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time inside to `name`."""
        outer = self.switch(name)
        try:
            yield
        finally:
            self.switch(outer)

    def switch(self, name: str) -> str:
        """Count the time from now on to `name`; return what was counted until now."""
        now, previous = time.perf_counter(), self._phase
        self.seconds[previous] = self.seconds.get(previous, 0.0) + now - self._since
        self._phase, self._since = name, now
        return previous

    def waits(self, items: Iterator[T], name: str) -> Iterator[T]:
        """`items`, with the time that each one is waited for counted to `name`."""
        while True:
            with self.phase(name):
                try:
                    item = next(items)
                except StopIteration:
                    return
            yield item

    def total(self, *names: str) -> float:
        """Seconds in these phases up to now; in all phases without names."""
        self.switch(self._phase)
        return sum(s for name, s in self.seconds.items() if not names or name in names)
