"""Reading the encoded images of an index's rows, from files of this machine or from anywhere else.

Remote files come in chunks through the node's cache. So do the row groups of Parquet, local ones too, as nothing less
of it can be read: decoded once for the whole node, an image in them is as near as one in a tar shard.
"""

import errno
import os
import stat
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np

from pipeline.config.data import DataConfig
from pipeline.data.index import Index
from pipeline.data.loading.cache import CHUNK_BYTES, DiskCache
from pipeline.data.loading.groups import OFFSET_BYTES, LruCache, read_group, row_group_ends
from pipeline.failures import READ_SOURCE_S, DamagedError, backoff, says_of_one_file
from pipeline.local_files import scratch_folder
from pipeline.storage import Storage

T = TypeVar("T")

# Of row groups in this process's memory, where they cannot go through the cache.
GROUP_BYTES = 256 * 2**20
# What waits to be fetched ahead; `read` fetches what found no room.
MAX_AHEAD = 1024
# In place of a chunk's number.
FIND_GROUPS = -1
# Between two lines about a storage that does not answer: many threads find it so at once.
NOT_REGULAR = "it is not a regular file"
WARN_PAUSE_S = 10.0, 600.0  # between two warnings: at first, twice as long each time, at most


class StorageAwayError(ConnectionError):
    """A storage has not answered for longer than one would wait; nothing is known of the image."""


class Reader:
    """Reads rows of one index; from several threads at once. To be closed.

    Args:
        warn: told what makes reading slow: a storage that does not answer, a full disk, an order that jumps about.
        retry_timeout_s: how long a storage that does not answer is waited for.
        chunk_bytes: how much of a remote file is fetched at once.
    """

    def __init__(
        self,
        index: Index,
        cfg: DataConfig,
        warn: Callable[[str], None] = lambda _: None,
        *,
        retry_timeout_s: float = READ_SOURCE_S,
        chunk_bytes: int = CHUNK_BYTES,
    ):
        self._index, self._root = index, index.root or Storage(".")
        self._warn, self._retry_timeout_s, self._chunk_bytes = warn, retry_timeout_s, chunk_bytes
        self._warn_from, self._warn_pause_s, self._closed = 0.0, WARN_PAUSE_S[0], threading.Event()
        self._away_since: float | None = None
        self._has_warned = False
        self._group_ends: dict[str, list[int]] = {}
        self._row_groups = LruCache(GROUP_BYTES)
        self._lock, self._reading_group = threading.Lock(), threading.Lock()
        self._in_flight: set[tuple[str, int]] = set()
        self._pool = ThreadPoolExecutor(cfg.read_threads, thread_name_prefix="ahead")
        self._cache = self._open_cache(cfg)

    def _open_cache(self, cfg: DataConfig) -> DiskCache | None:
        """The node's cache, where there is use for it."""
        index, max_bytes = self._index, int(cfg.cache_gb * 1e9)
        if not len(index) or (self._root.local and not index.file(0).endswith(".parquet")):
            return None
        sizes = index.sizes[:: max(1, len(index) // 1000)]  # all of a hundred million would take time and memory
        total = float(np.mean(sizes)) * len(index)
        in_shards = index.path(0) != index.file(0)
        if in_shards and total > max_bytes and cfg.shuffle_block is None:  # a chunk would go before its next image came
            self._warn(
                f"{index} has about {total / 1e9:.3g} GB, more than data.cache_gb={cfg.cache_gb:g}: shuffled as a "
                "whole, each image is fetched by itself, or with its row group; data.shuffle_block makes that faster"
            )
            return None
        return DiskCache(Path(cfg.cache_dir) if cfg.cache_dir else scratch_folder() / "cache", max_bytes, self._warn)

    def close(self) -> None:
        """End the threads, but wait for none; what they have not begun is not done."""
        with self._lock:
            self._closed.set()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def read(self, row: int) -> bytes:
        """The encoded image of one row; errors are `read_into`'s."""
        data = bytearray(self._index.sizes[row])
        self.read_into(row, memoryview(data))
        return bytes(data)

    def read_into(self, row: int, buffer: memoryview) -> None:
        """Fill a buffer with the encoded image of one row, of the size that the index has.

        Raises:
            OSError: the file is gone or shorter than the index says.
            StorageAwayError: its storage does not answer.
        """
        index, file = self._index, self._index.file(row)
        offset, size = int(index.offsets[row]), len(buffer)
        try:
            if self._root.local and not file.endswith(".parquet"):
                num_read = self._retry(_read_local, self._root.local / file, offset, buffer)
            else:
                in_parquet = file.endswith(".parquet")
                data = self._read_parquet(file, offset) if in_parquet else self._read_range(file, offset, offset + size)
                num_read = len(data)
                buffer[: min(size, num_read)] = data[:size]
        except OSError as e:
            if e.filename is not None:  # a local file's, which its text names
                raise
            kind = next((k for k in (FileNotFoundError, StorageAwayError) if isinstance(e, k)), OSError)
            raise kind(f"{index.full_path(row)}: {e}") from e
        if num_read != size:
            raise OSError(f"{index.full_path(row)}: {num_read} bytes where the index has {size}")

    def prefetch(self, rows: Iterable[int]) -> None:
        """Begin to fetch into the cache what these rows need; what goes wrong is left to `read`."""
        if self._usable_cache is None:
            return
        in_parquet: dict[str, list[int]] = {}
        for row in map(int, rows):
            file, offset = self._index.file(row), int(self._index.offsets[row])
            if file.endswith(".parquet"):
                in_parquet.setdefault(file, []).append(offset)
            else:
                for chunk in self._chunks(offset, offset + int(self._index.sizes[row])):
                    self._fetch_soon(file, chunk)
        for file, offsets in in_parquet.items():
            self._fetch_soon(file, FIND_GROUPS, offsets)

    @property
    def _usable_cache(self) -> DiskCache | None:
        return self._cache if self._cache and self._cache.usable else None

    def _fetch_soon(self, file: str, number: int, rows: Sequence[int] = ()) -> None:
        """Have a thread fetch a chunk, or a row group of a Parquet file, or find out which groups these rows are in."""
        with self._lock:
            if (file, number) in self._in_flight or len(self._in_flight) >= MAX_AHEAD or self._closed.is_set():
                return
            self._in_flight.add((file, number))
            self._pool.submit(self._fetch_ahead, file, number, rows)

    def _fetch_ahead(self, file: str, number: int, rows: Sequence[int]) -> None:
        try:
            if number == FIND_GROUPS:
                for group in sorted({self._find_group(file, row)[0] for row in rows}):
                    self._fetch_soon(file, group)
            elif (cache := self._usable_cache) and not cache.has(*self._cache_key(file, number)):
                self._read_cached(cache, file, number, 0, 0)
        except OSError:
            pass  # `read` meets it too, and tells
        finally:
            with self._lock:
                self._in_flight.discard((file, number))

    def _cache_key(self, file: str, number: int) -> tuple[object, ...]:
        return (self._root.uri, file, self._index.fingerprint, number, self._chunk_bytes)

    def _read_cached(self, cache: DiskCache, file: str, number: int, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of a chunk or a row group."""

        def fetch() -> bytes:
            if file.endswith(".parquet"):
                return self._read_group(file, number)
            first = number * self._chunk_bytes
            return self._retry(self._fetch, file, first, first + self._chunk_bytes)

        return cache.read(start, stop, fetch, *self._cache_key(file, number))

    def _chunks(self, start: int, stop: int) -> range:
        return range(start // self._chunk_bytes, -(-stop // self._chunk_bytes))

    def _read_range(self, file: str, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of a remote file, fewer where it ends before."""
        if (cache := self._usable_cache) is None:
            return self._retry(self._fetch, file, start, stop)
        size = self._chunk_bytes
        return b"".join(
            self._read_cached(cache, file, k, max(0, start - k * size), min(size, stop - k * size))
            for k in self._chunks(start, stop)
        )

    def _fetch(self, file: str, start: int, stop: int) -> bytes:
        with self._root.open(file) as f:
            stop = min(stop, f.seek(0, 2))
            f.seek(min(start, stop))
            return bytes(f.read(max(0, stop - start)))

    def _read_parquet(self, file: str, row: int) -> bytes:
        group, position = self._find_group(file, row)

        def part(start: int, stop: int) -> bytes:
            if cache := self._usable_cache:
                return self._read_cached(cache, file, group, start, stop)
            return self._row_groups.get((file, group), lambda: self._read_group(file, group))[start:stop]

        start, stop = np.frombuffer(part(OFFSET_BYTES * position, OFFSET_BYTES * (position + 2)), dtype="<i8").tolist()
        return part(start, stop)

    def _find_group(self, file: str, row: int) -> tuple[int, int]:
        """The row group that holds a row of a Parquet file, and the row's position in it."""
        if file not in self._group_ends:
            self._group_ends[file] = self._retry(row_group_ends, self._root, file)
        ends = self._group_ends[file]
        group = int(np.searchsorted(ends, row, side="right"))
        if group == len(ends):
            raise OSError(f"the file has {ends[-1] if ends else 0} rows")
        return group, row - (ends[group - 1] if group else 0)

    def _read_group(self, file: str, group: int) -> bytes:
        with self._reading_group:  # one at a time: they can be large
            return self._retry(read_group, self._root, file, group)

    def _retry(self, action: Callable[..., T], *args: object) -> T:
        """What `action(*args)` returns; while a storage does not answer, it is tried again for a while."""
        begun = time.monotonic()
        for pause in backoff():
            try:
                result = action(*args)
            except OSError as e:
                if says_of_one_file(e, self._root.local):
                    raise
                # One clock for all threads: who waited for another's fetch in vain does not begin to wait anew.
                now = time.monotonic()
                self._away_since = since = self._away_since or now
                if now + pause > min(begun, since) + self._retry_timeout_s or self._closed.is_set():
                    raise StorageAwayError(str(e)) from e
                self._warn_seldom(f"{self._root} does not answer, trying again for {self._retry_timeout_s:g} s: {e}")
                self._closed.wait(pause)
            else:
                if self._away_since is not None:
                    self._tell_back()
                return result
        raise AssertionError("the pauses never end")

    def _warn_seldom(self, text: str) -> None:
        with self._lock:
            now = time.monotonic()
            if now < self._warn_from:
                return
            self._warn_from = now + self._warn_pause_s
            self._warn_pause_s, self._has_warned = min(2 * self._warn_pause_s, WARN_PAUSE_S[1]), True
        self._warn(text)

    def _tell_back(self) -> None:
        """The end of what was warned of; what comes next is told within a minute."""
        with self._lock:
            has_warned, self._has_warned, self._away_since = self._has_warned, False, None
            self._warn_from = min(self._warn_from, time.monotonic() + 60)
        if has_warned:
            self._warn(f"{self._root} answers again")


def _read_local(path: Path, offset: int, buffer: memoryview) -> int:
    """Fill a buffer from a file; how many bytes there were for it."""
    try:  # without O_NONBLOCK, opening a pipe waits for somebody who writes
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as e:
        raise DamagedError(NOT_REGULAR) if e.errno == errno.ENXIO else e from None  # a socket, or no device's file
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise DamagedError(NOT_REGULAR)
        done = 0
        while done < len(buffer) and (more := os.preadv(descriptor, [buffer[done:]], offset + done)):
            done += more
        return done
    except OSError as e:
        if e.errno is not None:  # the system's own, which does not name the file
            e.filename = str(path)
        raise
    finally:
        os.close(descriptor)
