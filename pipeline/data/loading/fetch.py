"""The encoded bytes of batches, read ahead of need; and the count of images that turn out to be broken."""

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, repeat

os.environ.setdefault("PYNVIMGCODEC_VERBOSITY", "0")  # what it refuses is told here, once

from nvidia import nvimgcodec

from pipeline.config.data import DataConfig
from pipeline.data.batch_spec import BatchSpec
from pipeline.data.index import Index
from pipeline.data.loading.read import Reader, StorageAwayError
from pipeline.failures import FatalError

MAX_NAMED = 10
FETCH_AHEAD = 8  # batches beyond those that are being read, of data that comes over a network
Encoded = Sequence[bytes | None]  # None: the image is broken, and another is to take its place


class BadDataError(FatalError):
    """More images are broken than the configuration allows."""


class UnparsableError(ValueError):
    """These bytes are no image of a format that DALI reads."""


def max_bad_images(max_fraction: float, num_images: int) -> int:
    """How many images of an index may be broken; one always may."""
    return max(1, int(max_fraction * num_images))


class BadImages:
    """The broken images of an index.

    Args:
        max_fraction: of the index that may be broken; one image always may.
        on_bad: called once for each broken image with its path and the reason.

    Attributes:
        known: rows that are broken, and why, before anyone has read them (see `isolate`). They are never read.
    """

    def __init__(self, index: Index, max_fraction: float, on_bad: Callable[[str, str], None]):
        self._index, self._on_bad = index, on_bad
        self._max_number = max_bad_images(max_fraction, len(index))
        self._rows: set[int] = set()
        self.known: dict[int, str] = {}

    def count(self, row: int, reason: str) -> None:
        """Count a row, once.

        Raises:
            BadDataError: one too many.
        """
        if row in self._rows:
            return
        self._rows.add(row)
        self._on_bad(self._index.full_path(row), reason)
        if len(self._rows) > self._max_number:
            paths = ", ".join(self._index.path(r) for r in sorted(self._rows)[:MAX_NAMED])
            more = f" and {len(self._rows) - MAX_NAMED} more" if len(self._rows) > MAX_NAMED else ""
            raise BadDataError(  # at least: each worker counts its own, and none has seen all images
                f"at least {len(self._rows)} of {len(self._index)} images in {self._index} are broken, and "
                f"data.max_bad_fraction allows {self._max_number}: {paths}{more}; "
                "fix them, have them left out by a new index (pipeline index --verify), or raise the limit"
            )


class Fetcher:
    """Reads what batches need, some of them ahead.

    Args:
        warn: told what makes reading slow.
        retry_timeout_s: how long a storage that does not answer is waited for.
    """

    def __init__(
        self, index: Index, cfg: DataConfig, bad_images: BadImages, warn: Callable[[str], None], retry_timeout_s: float
    ):
        self._bad_images, self._read_ahead = bad_images, cfg.prefetch
        self._fetch_ahead = 0 if index.root is None or index.root.local else FETCH_AHEAD
        self._reader = Reader(index, cfg, warn, retry_timeout_s=retry_timeout_s)
        self._pool = ThreadPoolExecutor(cfg.read_threads, thread_name_prefix="read")

    def prefetch(self, specs: Iterator[BatchSpec]) -> Iterator[tuple[BatchSpec, Encoded]]:
        """Each batch with its images' bytes, None where an image is broken; further ones are on their way.

        Raises:
            StorageAwayError: the images' storage does not answer.
        """
        fetching, reading = deque[BatchSpec](), deque[tuple[BatchSpec, Iterator[bytes | None]]]()
        for spec in chain(specs, repeat(None)):  # None: there are no more
            num_fetched, num_read = (0, 0) if spec is None else (self._fetch_ahead, self._read_ahead)
            if spec is not None:
                self._reader.prefetch(spec.rows)
                fetching.append(spec)
            if len(fetching) > num_fetched:
                next_spec = fetching.popleft()
                reading.append((next_spec, self._pool.map(self._read, next_spec.rows)))
            if len(reading) > num_read:
                next_spec, encoded = reading.popleft()
                yield next_spec, list(encoded)
            elif spec is None:
                return

    def close(self) -> None:
        """End what has been begun."""
        self._reader.close()
        self._pool.shutdown(cancel_futures=True)

    def _read(self, row: int) -> bytes | None:
        if row in self._bad_images.known:
            self._bad_images.count(row, self._bad_images.known[row])
            return None
        try:
            encoded = self._reader.read(row)
            refuse_unparsable(encoded)
        except StorageAwayError:  # no fault of the image: another would take its place, unnoticed
            raise
        except (OSError, UnparsableError) as e:
            self._bad_images.count(row, str(e))
            return None
        return encoded


def refuse_unparsable(encoded: bytes) -> None:
    """Raise UnparsableError for what DALI's parser refuses: in a batch of some size, DALI 2.4 ends the process for it.

    The parser is the same one. Here it takes 2 us an image.
    """
    try:
        nvimgcodec.CodeStream(encoded).width  # noqa: B018  # it parses what is asked for
    except RuntimeError as e:
        raise UnparsableError("cannot be decoded: its header is damaged, or it is of no known format") from e
