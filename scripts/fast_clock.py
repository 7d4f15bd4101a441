"""The clock of `faults`: it runs fast while a fault lasts, so that a minute costs little more than a second."""

import contextlib
import faulthandler
import json
import os
import queue
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

RATE = 50.0  # seconds of the fast clock in a second
MINUTE_S = 60.0
SLICE_S = 0.02  # a wait looks at the clock so often


class Clock:
    """The time, fast from a fault on until its end: a minute later, or, where it hangs, the end of its process.

    Args:
        file: says so to all processes of a case.
    """

    def __init__(self, file: Path):
        self._file, self._now, self.real_monotonic = file, time.time, time.monotonic
        self.real_sleep = time.sleep
        self.since: float | None = None
        self._until: float | None = None
        self._deadline: float | None = None  # of faulthandler
        if file.exists():
            self.since, self._until = json.loads(file.read_text(encoding="utf-8"))

    def start(self, *, hangs: bool) -> None:
        self.since = self._now()
        self._until = None if hangs else self.since + MINUTE_S / RATE
        self._file.write_text(json.dumps([self.since, self._until]), encoding="utf-8")

    @property
    def is_fast(self) -> bool:
        return self.since is not None and (self._until is None or self._now() < self._until)

    def _ahead(self) -> float:
        if self.since is None:
            return 0.0
        now = self._now()
        return (RATE - 1) * (min(now, self._until or now) - self.since)

    def time(self) -> float:
        return self._now() + self._ahead()

    def monotonic(self) -> float:
        return self.real_monotonic() + self._ahead()

    def sleep(self, seconds: float) -> None:
        deadline = self.monotonic() + seconds
        while (left := deadline - self.monotonic()) > 0:
            self.real_sleep(min(left, SLICE_S))

    def _wait(self, real: Callable[..., Any], done: Callable[[Any], bool], timeout: float) -> Any:
        """Wait in slices, as the clock may become fast meanwhile."""
        deadline = self.monotonic() + timeout
        while not done(result := real(max(0.0, min(SLICE_S, deadline - self.monotonic())))):
            if self.monotonic() >= deadline:
                break
        return result

    def _wait_for_notice(self, condition: Any, timeout: float) -> bool:
        """As `Condition.wait`, which would lose a notice between two slices."""
        waiter, noticed = threading.Lock(), False
        waiter.acquire()
        condition._waiters.append(waiter)
        saved = condition._release_save()
        try:
            noticed = bool(self._wait(partial(waiter.acquire, True), bool, timeout))
        finally:
            condition._acquire_restore(saved)
            if not noticed:
                with contextlib.suppress(ValueError):
                    condition._waiters.remove(waiter)
        return noticed

    def install(self) -> None:
        """Have all of this process go by this clock."""
        wait, join = threading.Condition.wait, threading.Thread.join

        def condition_wait(condition: threading.Condition, timeout: float | None = None) -> bool:
            if timeout is None:
                return wait(condition)
            return self._wait_for_notice(condition, timeout)

        def thread_join(thread: threading.Thread, timeout: float | None = None) -> None:
            if timeout is None:
                join(thread)
            else:
                self._wait(partial(join, thread), lambda _: not thread.is_alive(), timeout)

        replaced: dict[Any, dict[str, Any]] = {
            time: {"time": self.time, "monotonic": self.monotonic, "sleep": self.sleep},
            threading: {"_time": self.monotonic},
            queue: {"time": self.monotonic},
            threading.Condition: {"wait": condition_wait},
            threading.Thread: {"join": thread_join},
            faulthandler: {"dump_traceback_later": self._dump_later, "cancel_dump_traceback_later": self._cancel},
        }
        for place, names in replaced.items():
            for name, function in names.items():
                setattr(place, name, function)

    def _dump_later(self, timeout: float, *, exit: bool, file: int) -> None:
        """As faulthandler's, whose timer knows no fast clock."""
        starts, self._deadline = self._deadline is None, self.monotonic() + timeout
        if starts:
            threading.Thread(target=self._watch, args=(file,), daemon=True).start()

    def _cancel(self) -> None:
        self._deadline = None

    def _watch(self, file: int) -> None:
        while (deadline := self._deadline) is not None:
            if self.monotonic() > deadline:
                faulthandler.dump_traceback(file)
                os._exit(1)
            self.real_sleep(SLICE_S)
