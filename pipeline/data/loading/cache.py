"""Pieces of remote files ("chunks"), kept on this machine's disk for all its processes, within a bound.

Each chunk is a file. It is written under another name and renamed, so that what a killed process leaves is never read;
who writes holds a lock of the kernel's, which goes with the process. The oldest in use goes first.
"""

import contextlib
import fcntl
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

CHUNK_BYTES = 8 * 2**20
# Locks of chunks: fewer would have readers of different chunks wait for each other.
NUM_LOCKS = 1024
# Eviction makes room for some more than is needed, so that the folder is not listed for every chunk.
KEEP_AFTER_EVICTION = 0.9
# After the disk was full, or could not be written to.
RETRY_AFTER_S = 60.0
# In front of a chunk's bytes: how many there are, by which a file that lost its end is told.
HEADER_BYTES = 8

CHUNKS, PARTS, LOCKS, USAGE = "chunks", "parts", "locks", "bytes"


class DiskCache:
    """A bounded folder of chunks; for several processes and threads at once.

    Args:
        folder: is made; nothing else may be in it.
        max_bytes: of all chunks together. What is being written comes within it: room is made first.
        warn: told, once, when the disk does not take any more.
    """

    def __init__(self, folder: Path, max_bytes: int, warn: Callable[[str], None]):
        self._folder, self._max_bytes, self._warn = folder, max_bytes, warn
        self._unusable_until, self._has_warned = 0.0, False
        with self._survive_disk_errors(), self._lock_usage() as usage:
            _count_usage(usage, self._evict(to=max_bytes))  # also removes what killed processes left

    @property
    def usable(self) -> bool:
        """Not after the disk did not take a chunk, for a while: `read` would fetch one for every call."""
        return time.monotonic() >= self._unusable_until

    def has(self, *key: object) -> bool:
        """Whether the chunk is here; it may be gone the next moment."""
        return self._path(key).exists()

    def read(self, start: int, stop: int, fetch: Callable[[], bytes], *key: object) -> bytes:
        """Bytes [start, stop) of the chunk, fewer where it ends before; `fetch` gets the whole if it is not here.

        Of several processes that want it at once, one fetches and the others wait.

        Args:
            key: what the chunk's content is a function of.

        Raises:
            OSError: from `fetch`; the cache itself raises nothing.
        """
        path = self._path(key)
        if (part := _read_part(path, start, stop)) is not None:
            return part
        with self._fetch_alone(path.name):
            if (part := _read_part(path, start, stop)) is not None:
                return part
            data = fetch()
            self._store(path, data)
        return data[start:stop]

    def _path(self, key: tuple[object, ...]) -> Path:
        name = hashlib.sha256("\n".join(map(str, key)).encode()).hexdigest()
        return self._folder / CHUNKS / name[:2] / name

    def _store(self, path: Path, data: bytes) -> None:
        size = HEADER_BYTES + len(data)
        if not self.usable or size > self._max_bytes:
            return
        with self._survive_disk_errors():
            temporary = self._folder / PARTS / path.name
            try:
                with self._reserve(temporary, size) as descriptor:
                    with open(descriptor, "wb", closefd=False) as f:
                        f.writelines((len(data).to_bytes(HEADER_BYTES, "little"), data))
                    os.fdatasync(descriptor)  # else, after a host's crash, it could be there with zeros in it
                    path.parent.mkdir(parents=True, exist_ok=True)
                    temporary.rename(path)
            except OSError:
                temporary.unlink(missing_ok=True)
                raise

    @contextlib.contextmanager
    def _reserve(self, temporary: Path, size: int) -> Iterator[int]:
        """A new file of `size` bytes, locked, counted before it is there."""
        with self._lock_usage() as usage:
            used = _count_usage(usage)
            if used is None or used + size > self._max_bytes:
                used = self._evict(to=self._max_bytes - size)
            _count_usage(usage, used + size)
            descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                os.truncate(descriptor, size)  # so that who lists the folder counts it whole
            except BaseException:
                os.close(descriptor)
                raise
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def _evict(self, to: int) -> int:
        """Delete abandoned parts, and the chunks used least lately if there are more than `to` bytes; the bytes left.

        With the usage locked.
        """
        used = sum(_size_unless_abandoned(part) for part in (self._folder / PARTS).iterdir())
        chunks = []
        for folder in (self._folder / CHUNKS).iterdir():
            with os.scandir(folder) as entries:
                for entry in entries:
                    with contextlib.suppress(FileNotFoundError):
                        stat = entry.stat()
                        chunks.append((stat.st_mtime_ns, stat.st_size, entry.path))
        used += sum(size for _, size, _ in chunks)
        if used > to:
            for _, size, path in sorted(chunks):
                if used <= min(to, KEEP_AFTER_EVICTION * self._max_bytes):
                    break
                Path(path).unlink(missing_ok=True)
                used -= size
        return used

    @contextlib.contextmanager
    def _lock_usage(self) -> Iterator[int]:
        """The file that holds the number of bytes in use, locked."""
        for name in (CHUNKS, PARTS):
            (self._folder / name).mkdir(parents=True, exist_ok=True)
        with _lock_file(self._folder / USAGE) as descriptor:
            yield descriptor

    @contextlib.contextmanager
    def _fetch_alone(self, name: str) -> Iterator[None]:
        """Only one process and thread fetches this chunk; all do where the disk does not even take a lock."""
        with contextlib.ExitStack() as stack:
            with self._survive_disk_errors():
                (self._folder / LOCKS).mkdir(parents=True, exist_ok=True)
                stack.enter_context(_lock_file(self._folder / LOCKS / str(int(name[:8], 16) % NUM_LOCKS)))
            yield

    @contextlib.contextmanager
    def _survive_disk_errors(self) -> Iterator[None]:
        """Survive a disk that is full or cannot be written to: tell it once, and do without for a while."""
        try:
            yield
        except OSError as e:
            self._unusable_until = time.monotonic() + RETRY_AFTER_S
            if not self._has_warned:
                self._has_warned = True
                self._warn(
                    f"the cache in {self._folder} cannot be written to, so remote data is read without it: "
                    f"{e.strerror or e}; free space there, or set data.cache_dir or data.cache_gb"
                )


def _read_part(path: Path, start: int, stop: int) -> bytes | None:
    """Bytes [start, stop) of a chunk's file; None if it is not there or not whole. It counts as used now."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return None
    try:
        size = int.from_bytes(os.pread(descriptor, HEADER_BYTES, 0), "little")
        if os.fstat(descriptor).st_size != HEADER_BYTES + size:
            return None
        with contextlib.suppress(OSError):  # of another user, say
            os.utime(descriptor)
        start, stop = min(start, size), min(stop, size)
        part = os.pread(descriptor, stop - start, HEADER_BYTES + start)
        return part if len(part) == stop - start else None
    except OSError:  # a bad disk
        return None
    finally:
        os.close(descriptor)


def _count_usage(usage: int, new: int | None = None) -> int | None:
    """The number of bytes in use, or a new one for it; None where there is none that can be read."""
    if new is not None:
        os.pwrite(usage, b"%020d" % new, 0)
        return new
    text = os.pread(usage, 20, 0)
    return int(text) if len(text) == 20 and text.isdigit() else None


def _size_unless_abandoned(part: Path) -> int:
    """The size of a file that is being written; 0, and it is deleted, if its writer has died."""
    with contextlib.suppress(FileNotFoundError), part.open("rb") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return os.fstat(f.fileno()).st_size
        part.unlink(missing_ok=True)
    return 0


@contextlib.contextmanager
def _lock_file(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)
