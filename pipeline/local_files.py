"""Files of this machine: kept apart by user, written whole or not at all, deleted where their writer has died."""

import contextlib
import errno
import fcntl
import glob
import os
import shutil
import socket
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from pipeline.errors import UserError
from pipeline.machine import user_name

OLD_S = 86400.0  # nothing takes a day to be written


def scratch_folder() -> Path:
    """Where this machine keeps what it may lose: this user's alone, as it names the server that gets its records.

    Raises:
        PermissionError: another user has made it, where all may write.
    """
    folder = Path(tempfile.gettempdir(), f"pipeline-{user_name()}")
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700, parents=True)
    status = folder.lstat()
    if status.st_uid != os.geteuid() or not stat.S_ISDIR(status.st_mode):
        text = f"{folder} is not a folder of this user's; have it removed, or set TMPDIR to one of your own"
        raise PermissionError(errno.EPERM, text)
    if stat.S_IMODE(status.st_mode) & 0o077:
        folder.chmod(0o700)
    return folder


@contextlib.contextmanager
def alone(folder: Path, *, wait: bool = True) -> Iterator[bool]:
    """One process or thread of this machine at a time, by a lock on a folder; without where there are no locks.

    Yields:
        Whether it is so; never False where it may wait.
    """
    descriptor, is_alone = os.open(folder, os.O_RDONLY), True
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as e:
            is_alone = e.errno != errno.EWOULDBLOCK
        yield is_alone
    finally:
        os.close(descriptor)


def temporary_name(name: str) -> str:
    """Of a file or folder that this process is writing, and which is to be called `name`."""
    return f".{name}.{socket.gethostname()}.{os.getpid()}"


def remove_leftovers(folder: Path, pattern: str) -> None:
    """Delete what processes of this machine, which are dead, were writing in a folder, perhaps one that all share.

    Args:
        pattern: of names.
    """
    for path in folder.glob(f".{pattern}.{glob.escape(socket.gethostname())}.*"):
        if path.suffix[1:].isdecimal() and not psutil.pid_exists(int(path.suffix[1:])):
            _delete(path)
    for path in folder.glob(f".{pattern}.*.*"):  # of others, such as containers that are no more
        with contextlib.suppress(FileNotFoundError):
            if path.suffix[1:].isdecimal() and path.stat().st_mtime < time.time() - OLD_S:
                _delete(path)


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def fsync(path: Path) -> None:
    """Have the disk hold a file's content, or a directory's entries, as far as its file system does that."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as e:
        if not (path.is_dir() and e.errno in (errno.EINVAL, errno.ENOTSUP)):  # some of FUSE and SMB sync files alone
            raise
    finally:
        os.close(descriptor)


def make_folder(out: Path) -> None:
    """Make the folder for a result, before anything is measured.

    Raises:
        UserError: it cannot be made.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"--out {out}: {e.strerror or e}; name another directory") from None
