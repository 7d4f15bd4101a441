"""The actor between the driver and its workers. On its own, so that its process imports little and starts fast.

Both sides ask for what comes next and get an answer once there is one: a call of Ray's costs a millisecond of CPU here
and there, and asking time and again would take part of a core for as long as a training runs.
"""

import asyncio
import contextlib
from collections.abc import Callable

from pipeline.job import Event, StopReason

MAX_WAIT_S = 2.0  # before the one who asks is told that there is nothing yet


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
        self._changed = asyncio.Event()

    async def begin(self, attempt: int) -> None:
        self._attempt, self._nodes, self._stop = attempt, set(), None

    async def join(self, attempt: int, node: str) -> None:
        """A worker has started on a node."""
        if attempt == self._attempt:
            self._nodes.add(node)

    async def nodes(self) -> set[str]:
        """Where workers run."""
        return self._nodes

    async def emit(self, attempt: int, event: Event) -> None:
        if attempt == self._attempt:
            self._events.append(event)
            self._notify()

    async def take_events(self, *, wait: bool = True) -> list[Event]:
        """Those since the last call."""
        if wait:
            await self._wait(lambda: bool(self._events))
        events, self._events = self._events, []
        return events

    async def poll(self, attempt: int, step: int) -> StopReason | None:
        """What rank 0 asks for time and again, telling the steps done.

        Raises:
            RuntimeError: a later session has begun.
        """
        if attempt < self._attempt:
            raise RuntimeError(f"session {self._attempt} has begun")
        self._step = step
        await self._wait(lambda: self._stop is not None)
        return self._stop

    async def step(self) -> int:
        """The last step known to be done."""
        return self._step

    async def request_stop(self, reason: StopReason) -> None:
        if self._stop != "interrupted":
            self._stop = reason
            self._notify()

    async def fail(self, attempt: int, kind: str, text: str) -> None:
        """An error that a new start would meet again."""
        if attempt == self._attempt:
            self._fatal = self._fatal or (kind, text)

    async def fatal(self) -> tuple[str, str] | None:
        return self._fatal

    def _notify(self) -> None:
        """Wake all who wait; each looks whether it was for what it waits for."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def _wait(self, holds: Callable[[], bool]) -> None:
        """Until it holds, or for MAX_WAIT_S."""
        deadline = asyncio.get_running_loop().time() + MAX_WAIT_S
        while not holds() and (left := deadline - asyncio.get_running_loop().time()) > 0:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), left)
