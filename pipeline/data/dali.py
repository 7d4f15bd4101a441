"""DALI: from encoded images and draws to uint8 pixels. The only file that imports `nvidia.dali`.

One description serves CPU and GPU, training and evaluation: what to cut out of each image and
whether to flip it is decided outside (`sampling`) and comes in beside the bytes, so DALI holds no
randomness and no position of its own, and can be thrown away and rebuilt at any moment. That is how
a broken image is survived: DALI's pipeline dies of it, and a new one carries on.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def
from torch import Tensor

from pipeline.config import DataConfig
from pipeline.data.index import Index
from pipeline.data.sampling import BoolArray, IntArray

# What stands in for an image that cannot be decoded: ImageNet's mean colour, 0 after normalisation.
STAND_IN = (124, 116, 104)


class BadDataError(RuntimeError):
    """More images are broken than the configuration allows."""


@dataclass(frozen=True)
class Request:
    """Images to decode together: rows (B,), anchors and shapes (B, 2) as (y, x) pixels, flips (B,)."""

    rows: IntArray
    anchors: IntArray
    shapes: IntArray
    flips: BoolArray

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, part: slice) -> "Request":
        return Request(self.rows[part], self.anchors[part], self.shapes[part], self.flips[part])


Encoded = Sequence[bytes]


@pipeline_def  # type: ignore[untyped-decorator]
def _decode_resize_flip(source: Callable[[], Any], size: int, on_gpu: bool) -> Any:
    encoded, anchors, shapes, flips = fn.external_source(source=source, num_outputs=4, batch=True, no_copy=True)
    images = fn.decoders.image_slice(encoded, anchors, shapes, axes=[0, 1], device="mixed" if on_gpu else "cpu")
    images = fn.resize(images, size=(size, size), antialias=True)  # triangular filter, as torchvision's antialias
    return fn.flip(images, horizontal=flips)


class Decoder:
    """Decodes a stream of requests, reading and decoding the next ones while the caller uses one.

    Args:
        size: height and width of the output, pixels.
        max_batch: most images in a request.
        num_threads: DALI's CPU threads.
        on_bad: called once for each broken image with its path and the reason.
    """

    def __init__(
        self,
        index: Index,
        cfg: DataConfig,
        max_batch: int,
        num_threads: int,
        device: torch.device,
        on_bad: Callable[[str, str], None],
    ):
        self._index, self._device, self._on_bad = index, device, on_bad
        self._size, self._prefetch = cfg.image_size, cfg.prefetch
        self._max_batch, self._num_threads = max_batch, num_threads
        self._max_bad = max(1, int(cfg.max_bad_fraction * len(index)))
        self._bad: set[int] = set()
        self._pool = ThreadPoolExecutor(cfg.read_threads, thread_name_prefix="read")

    def decode(self, requests: Iterator[Request]) -> Iterator[tuple[Request, Tensor]]:
        """Yield each request with its (B, 3, size, size) uint8 pixels, channels_last, on the device.

        Raises:
            BadDataError: more broken images than `max_bad_fraction` of the index.
        """
        encoded_ahead = self._read_ahead(requests)
        in_flight: deque[tuple[Request, Encoded]] = deque()

        def source() -> Any:
            in_flight.append(next(encoded_ahead))
            return _dali_inputs(*in_flight[-1])

        pipe = self._build(source, self._max_batch)
        while True:
            try:
                images = self._run(pipe)
            except StopIteration:
                return
            except RuntimeError as e:  # a broken image: redo what the dead pipeline had in flight, then go on anew
                if isinstance(e, BadDataError) or not in_flight:
                    raise
                pipe = self._build(source, self._max_batch)
                while in_flight:
                    request, encoded = in_flight.popleft()
                    yield request, self._salvage(request, encoded).contiguous(memory_format=torch.channels_last)
                continue
            yield in_flight.popleft()[0], images

    def _read_ahead(self, requests: Iterator[Request]) -> Iterator[tuple[Request, Encoded]]:
        reading = deque[tuple[Request, Iterator[bytes]]]()
        for request in requests:
            reading.append((request, self._pool.map(self._read, request.rows)))
            if len(reading) > self._prefetch:
                request, encoded = reading.popleft()
                yield request, list(encoded)
        for request, encoded in reading:
            yield request, list(encoded)

    def _read(self, row: int) -> bytes:
        try:
            return self._index.read(row)
        except OSError as e:
            self._count_bad(row, str(e))
            return b""  # DALI refuses it, and the stand-in takes its place

    def _build(self, source: Callable[[], Any], batch_size: int) -> Any:
        on_gpu = self._device.type == "cuda"
        return _decode_resize_flip(
            source,
            self._size,
            on_gpu,
            batch_size=batch_size,
            num_threads=self._num_threads,
            device_id=(self._device.index or 0) if on_gpu else None,
            prefetch_queue_depth=self._prefetch,
        )

    def _run(self, pipe: Any) -> Tensor:
        stream = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None
        (images,) = pipe.run(stream)
        # Shares DALI's memory, which lives as long as the tensor: NHWC seen as channels_last NCHW.
        nhwc: Tensor = torch.utils.dlpack.from_dlpack(images.as_tensor())
        return nhwc.permute(0, 3, 1, 2)

    def _salvage(self, request: Request, encoded: Encoded) -> Tensor:
        """Decode a request that may hold broken images: by halves, down to the broken ones alone."""
        once = iter([_dali_inputs(request, encoded)])
        try:
            return self._run(self._build(lambda: next(once), len(request)))
        except RuntimeError as e:
            if len(request) == 1:
                self._count_bad(int(request.rows[0]), _reason(e))
                stand_in = torch.tensor(STAND_IN, dtype=torch.uint8, device=self._device)
                return stand_in.view(1, 3, 1, 1).expand(1, 3, self._size, self._size)
            half = len(request) // 2
            parts = [self._salvage(request[s], encoded[s]) for s in (slice(half), slice(half, None))]
            return torch.cat(parts)

    def _count_bad(self, row: int, reason: str) -> None:
        if row in self._bad:
            return
        self._bad.add(row)
        self._on_bad(str(self._index.root / self._index.path(row)), reason)
        if len(self._bad) > self._max_bad:
            paths = ", ".join(self._index.path(r) for r in sorted(self._bad)[:10])
            raise BadDataError(
                f"{len(self._bad)} of {len(self._index)} images in {self._index.root} are broken, more than "
                f"data.max_bad_fraction allows: {paths}; mend or remove them, or raise the limit"
            )


def _dali_inputs(request: Request, encoded: Encoded) -> tuple[Any, ...]:
    return (
        [np.frombuffer(data, dtype=np.uint8) for data in encoded],
        request.anchors.astype(np.int32),
        request.shapes.astype(np.int32),
        request.flips.astype(np.int32),
    )


def _reason(error: Exception) -> str:
    """What DALI's decoder says, out of the many lines around it."""
    lines = [line.strip() for line in str(error).partition("encountered:")[2].splitlines() if line.strip()]
    return lines[0] if lines else str(error).strip()
