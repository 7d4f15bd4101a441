"""A rank that hangs becomes a failure, which is recovered from, and not a night of waiting."""

import faulthandler

STDERR = 2
# Collectives fail after the same time, and say which one it was; that should come first.
GRACE_S = 10


class Watchdog:
    """Ends the process, with the stack of each of its threads on stderr, when it is not fed for so long.

    The timer is a thread in C, which fires also when no Python code gets to run.
    """

    def __init__(self, timeout_s: float):
        self._timeout_s = timeout_s + GRACE_S

    def feed(self, more_s: float = 0.0) -> None:
        """Wait again, and so much longer for what is known to take long."""
        faulthandler.dump_traceback_later(self._timeout_s + more_s, exit=True, file=STDERR)

    def stop(self) -> None:
        faulthandler.cancel_dump_traceback_later()

    def __enter__(self) -> "Watchdog":
        self.feed()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()
