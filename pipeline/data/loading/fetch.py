"""The encoded bytes of a batch, one after another in one buffer. Knows neither DALI nor torch."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

os.environ.setdefault("PYNVIMGCODEC_VERBOSITY", "0")  # what it refuses is told here, once

import numpy as np
from numpy.typing import NDArray
from nvidia import nvimgcodec

from pipeline.config.data import DataConfig
from pipeline.data.batch_spec import BatchSpec
from pipeline.data.index import Index
from pipeline.data.loading.read import Reader, StorageAwayError
from pipeline.data.stream import IntArray

# What stands for pixels that are not there: ImageNet's mean colour, 0 after normalisation.
MEAN_COLOUR = (124, 116, 104)
STAND_IN = b"P6 1 1 255\n" + bytes(MEAN_COLOUR)  # of a broken image: a file in PPM's format, of one pixel
NUM_TOGETHER = 8  # images that a thread reads for one call
Bytes = NDArray[np.uint8]


class UnparsableError(ValueError):
    """These bytes are no image of a format that DALI reads."""


@dataclass(frozen=True)
class EncodedBatch:
    """A batch that is read and not yet decoded.

    spec: of a broken image it takes the stand-in's one pixel. data: uint8, the images' bytes. starts, stops: (B,),
    where in `data` each image lies. bad: by their place in the batch, why images are broken. release: to be called once
    nobody reads `data` any more.
    """

    spec: BatchSpec
    data: Bytes
    starts: IntArray
    stops: IntArray
    bad: dict[int, str]
    release: Callable[[], None] = lambda: None

    @property
    def images(self) -> list[Bytes]:
        """Each image's bytes, in the memory of `data`."""
        data = self.data
        return [data[a:b] for a, b in zip(self.starts.tolist(), self.stops.tolist(), strict=True)]

    def part(self, start: int, stop: int) -> "EncodedBatch":
        """Images [start, stop), to be decoded alone."""
        spec = self.spec.part(start, stop)
        return EncodedBatch(spec, self.data, self.starts[start:stop], self.stops[start:stop], {})


class BatchReader:
    """Reads batches of an index, several images at once. To be closed.

    Args:
        warn: told what makes reading slow.
        retry_timeout_s: how long a storage that does not answer is waited for.

    Attributes:
        known: rows that are broken, and why, before anyone has read them (see `isolate`). They are never read.
    """

    def __init__(self, index: Index, cfg: DataConfig, warn: Callable[[str], None], retry_timeout_s: float):
        self._index, self.known = index, dict[int, str]()
        self._reader = Reader(index, cfg, warn, retry_timeout_s=retry_timeout_s)
        self._pool = ThreadPoolExecutor(cfg.read_threads, thread_name_prefix="read")

    def prefetch(self, spec: BatchSpec) -> None:
        """Begin to fetch what a later batch needs, where it comes over a network."""
        self._reader.prefetch(spec.rows)

    def read(self, spec: BatchSpec, allocate: Callable[[int], memoryview]) -> EncodedBatch:
        """Read a batch into the memory that `allocate` gives for a number of bytes.

        Raises:
            StorageAwayError: the images' storage does not answer.
        """
        sizes = self._index.sizes[spec.rows]
        room = np.maximum(sizes, len(STAND_IN))
        ends = room.cumsum()
        starts, stops = ends - room, ends - room + sizes
        buffer = allocate(int(ends[-1]))
        places = list(zip(spec.rows.tolist(), starts.tolist(), stops.tolist(), strict=True))

        def read_some(first: int) -> dict[int, str]:
            some = enumerate(places[first : first + NUM_TOGETHER], first)
            reasons = {place: self._read(row, buffer[start:stop]) for place, (row, start, stop) in some}
            return {place: reason for place, reason in reasons.items() if reason is not None}

        bad: dict[int, str] = {}
        for some_bad in self._pool.map(read_some, range(0, len(places), NUM_TOGETHER)):
            bad |= some_bad
        for place in bad:
            stops[place] = starts[place] + len(STAND_IN)
            buffer[starts[place] : stops[place]] = STAND_IN
        return EncodedBatch(_with_stand_ins(spec, list(bad)), np.frombuffer(buffer, np.uint8), starts, stops, bad)

    def close(self) -> None:
        """End what has been begun."""
        self._reader.close()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _read(self, row: int, buffer: memoryview) -> str | None:
        """Why the image is broken; None where it is not, and its bytes are in the buffer."""
        if row in self.known:
            return self.known[row]
        try:
            self._reader.read_into(row, buffer)
            refuse_unparsable(buffer)
        except StorageAwayError:  # no fault of the image: another would take its place, unnoticed
            raise
        except (OSError, UnparsableError) as e:
            reason = getattr(e, "strerror", None) or str(e)
            return reason.removeprefix(f"{self._index.full_path(row)}: ")  # which is told anyway
        return None


def _with_stand_ins(spec: BatchSpec, places: list[int]) -> BatchSpec:
    if not places:
        return spec
    anchors, shapes = spec.anchors.copy(), spec.shapes.copy()
    anchors[places], shapes[places] = 0, 1
    return replace(spec, anchors=anchors, shapes=shapes)


def refuse_unparsable(encoded: bytes | memoryview) -> None:
    """Raise UnparsableError for what DALI's parser refuses: in a batch of some size, DALI 2.4 ends the process for it.

    The parser is the same one. Here it takes 3 us an image.
    """
    try:
        nvimgcodec.CodeStream(np.frombuffer(memoryview(encoded).toreadonly(), np.uint8)).width  # noqa: B018  # it parses what is asked for
    except RuntimeError as e:
        raise UnparsableError("its header is damaged, or it is of no known format") from e
