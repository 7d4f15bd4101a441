"""Only one process of a machine trains a run."""

import contextlib
import fcntl
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, Any

from pipeline.errors import UserError
from pipeline.failures import LOCK_S, Interrupted
from pipeline.storage import Storage

FILE = "lock"
ENDING = ", which is about to end"


@contextmanager
def run_lock(
    run: Storage,
    warn: Callable[[str], None],
    ending: threading.Event | None = None,
    timeout_s: float = LOCK_S,
    heartbeat: Callable[[], None] = lambda: None,
) -> Iterator[None]:
    """Keep other processes of this machine from the run; the lock goes with the process, however it ends.

    Between machines that share no directory, and where a file system knows no locks (some of NFS and Lustre), the later
    driver wins, see `Claim.check`.

    Args:
        ending: set when this process is to end; who waits for the lock is told.
        timeout_s: how long a process that is about to end is waited for. heartbeat: called meanwhile.

    Raises:
        UserError: another process has the run. Interrupted: this one was to end meanwhile.
    """
    with (run.local_dir / FILE).open("a+", encoding="utf-8") as file:
        began, last_holder = time.monotonic(), ""
        while not _taken(file, fcntl.LOCK_EX, warn):
            file.seek(0)
            holder = file.read() or "another process"
            limit_s = timeout_s if holder.endswith(ENDING) else LOCK_S
            if time.monotonic() > began + limit_s:
                raise UserError(
                    f"run.name={run.name}: is being trained by {holder}; wait for its end, or use another name"
                )
            if last_holder != holder:
                last_holder = holder
                warn(f"waiting {limit_s:.0f} s for {holder}, to leave the run")
            heartbeat()
            if (ending or threading.Event()).wait(0.2):
                raise Interrupted
        _write(file, holder := f"process {os.getpid()} on {socket.gethostname()}")
        if ending is not None:
            threading.Thread(target=_tell_ending, args=(file, holder, ending), daemon=True).start()
        yield


def _tell_ending(file: IO[str], holder: str, ending: threading.Event) -> None:
    ending.wait()
    with contextlib.suppress(ValueError):  # it has ended, and the file is closed
        _write(file, holder + ENDING)


def _write(file: IO[str], text: str) -> None:
    file.truncate(0)
    file.write(text)
    file.flush()


def is_held(run: Storage) -> bool:
    """Whether a process of this machine has the run's lock; where it is free, it is taken for a moment."""
    try:
        with (run.local_dir / FILE).open("rb") as file:
            return not _taken(file, fcntl.LOCK_SH, lambda _: None)
    except FileNotFoundError:
        return False


def _taken(file: IO[Any], kind: int, warn: Callable[[str], None]) -> bool:
    """Whether nobody is in the way: the lock is taken, or the file system has none."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as e:
        warn(f"{file.name} cannot be locked ({e.strerror}): do not train the run by two commands at once")
    return True
