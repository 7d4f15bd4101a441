"""The lock of a run: held means held, and a file system without locks is no other process."""

import errno
import fcntl
import os
import socket
import threading
import time
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.failures import Interrupted
from pipeline.runs import lock
from pipeline.runs.lock import is_held, run_lock
from pipeline.storage import Storage


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_told_and_trained_on(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lustre without -o flock, NFS without lockd."""

    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    told: list[str] = []
    with run_lock(Storage(str(tmp_path)), told.append):
        assert not is_held(Storage(str(tmp_path)))
    (text,) = told
    assert text.startswith(f"{tmp_path}/lock cannot be locked ({os.strerror(code)})")


def test_a_run_that_is_held_is_waited_for_and_then_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "LOCK_S", 0.3)
    run, told = Storage(str(tmp_path)), list[str]()
    assert not is_held(run)
    with run_lock(run, told.append):
        assert is_held(run)
        holder = f"process {os.getpid()} on "
        with pytest.raises(UserError, match=f"is being trained by {holder}"), run_lock(run, told.append):
            pass
    (text,) = told
    assert text == f"waiting 0 s for process {os.getpid()} on {socket.gethostname()}, to leave the run"
    assert not is_held(run)
    with run_lock(run, told.append):
        pass


def test_a_wish_to_stop_ends_the_wait(tmp_path: Path) -> None:
    run, ending = Storage(str(tmp_path)), threading.Event()
    ending.set()
    began = time.monotonic()
    with run_lock(run, print), pytest.raises(Interrupted), run_lock(run, print, ending):
        pass
    assert time.monotonic() - began < 10


def test_a_holder_that_is_about_to_end_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its last checkpoint may take longer than one would wait for a process that trains on."""
    monkeypatch.setattr(lock, "LOCK_S", 0.3)
    run, told, ending, left = Storage(str(tmp_path)), list[str](), threading.Event(), threading.Event()

    def hold() -> None:
        with run_lock(run, told.append, ending):
            assert left.wait(30)

    holder = threading.Thread(target=hold)
    holder.start()
    ending.set()
    while not is_held(run) or not (tmp_path / "lock").read_text().endswith(lock.ENDING):
        time.sleep(0.05)
    threading.Timer(1, left.set).start()
    with run_lock(run, told.append, timeout_s=30):
        holder.join()
    assert told == [f"waiting 30 s for process {os.getpid()} on {socket.gethostname()}{lock.ENDING}, to leave the run"]
