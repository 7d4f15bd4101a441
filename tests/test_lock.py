"""The lock of a run: held means held, and a file system without locks is no other process."""

import errno
import fcntl
import os
from pathlib import Path

import pytest

from pipeline import lock
from pipeline.config import ConfigError
from pipeline.lock import is_held, run_lock
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
    monkeypatch.setattr(lock, "PATIENCE_S", 0.3)
    run, told = Storage(str(tmp_path)), list[str]()
    assert not is_held(run)
    with run_lock(run, told.append):
        assert is_held(run)
        holder = f"process {os.getpid()} on "
        with pytest.raises(ConfigError, match=f"is being trained by {holder}"), run_lock(run, told.append):
            pass
    assert len(told) == 1
    assert not is_held(run)
    with run_lock(run, told.append):
        pass
