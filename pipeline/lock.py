"""Only one process of a machine trains a run."""

import fcntl
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, Any

from pipeline.config import ConfigError
from pipeline.storage import Storage

FILE = "lock"
PATIENCE_S = 60.0  # with a process that is about to end, its supervisor dead


@contextmanager
def run_lock(run: Storage, warn: Callable[[str], None]) -> Iterator[None]:
    """Keep other processes of this machine from the run; the lock goes with the process, however it ends.

    Between machines that share no directory, and where a file system knows no locks (some of NFS and Lustre), the later
    session wins, see `Identity.check`.

    Raises:
        ConfigError: another process has the run.
    """
    with (run.scratch / FILE).open("a+", encoding="utf-8") as file:
        deadline, told = time.monotonic() + PATIENCE_S, False
        while not _taken(file, fcntl.LOCK_EX, warn):
            file.seek(0)
            holder = file.read() or "another process"
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"run.name={run.name}: is being trained by {holder}; wait for its end, or use another name"
                )
            if not told:
                told = True
                warn(f"waiting {PATIENCE_S:.0f} s for {holder}, which has the run")
            time.sleep(0.2)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def is_held(run: Storage) -> bool:
    """Whether a process of this machine has the run's lock; where it is free, it is taken for a moment."""
    try:
        with (run.scratch / FILE).open("rb") as file:
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
