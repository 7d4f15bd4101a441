"""Starting Ray on this machine, and again where the machine was too busy."""

import threading
from collections.abc import Callable
from typing import TypeVar

import psutil
import ray

from pipeline import machine
from pipeline.errors import one_line
from pipeline.failures import BROKEN, TrainingFailedError

T = TypeVar("T")
TRIES = 3


class RayStartError(TrainingFailedError):
    """Ray did not start on this machine, which may be too busy."""


def start_with_retries(start: Callable[[], T], warn: Callable[[str], None], wants_stop: threading.Event) -> T:
    """Call `start` until Ray runs, and return what it returns.

    Ray gives its processes 15 to 60 s, whatever else the machine does: a cold disk can be too slow for that.

    Raises:
        RayStartError: it failed each time, or another try would be useless.
    """
    for number in range(1, TRIES + 1):
        others = set(psutil.Process().children(recursive=True))
        try:
            return start()
        except Exception as e:  # of any class: where its processes are too slow, Ray raises `Exception` itself
            reason = one_line(e)
            ray.shutdown()
            machine.kill_descendants(others)  # what Ray had started, which would stay to this process's end
            if number == TRIES or isinstance(e, BROKEN) or wants_stop.is_set():
                raise RayStartError(f"Ray did not start on this machine in {number} tries: {reason}") from None
            warn(f"Ray did not start ({reason}); trying again")
    raise AssertionError("the last try returns or raises")
