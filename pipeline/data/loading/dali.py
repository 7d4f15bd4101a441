"""From encoded images and draws to uint8 pixels, ahead of need.

What to cut out of each image and what to do with it is decided outside (`sampling`, `draws`) and comes in beside the
bytes, so DALI holds no randomness and no position of its own, and can be thrown away and rebuilt at any moment.
That is how a broken image is survived: DALI's pipeline dies of it, and a new one carries on. What DALI would not even
parse is found out before (`fetch`), and never reaches it.

On a GPU one DALI graph does it all. On the CPU DALI decodes and augments, and torch resizes in between: its uint8
kernel takes a third of the time of DALI's, which was half of the whole (docs/performance.md).
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import Any, TypeVar

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def
from torch import Tensor
from torch.nn import functional as F
from torch.utils.dlpack import from_dlpack

from pipeline.config.schema import DataConfig
from pipeline.data.batch_spec import BatchSpec
from pipeline.data.index import Index
from pipeline.data.loading.augment import MEAN_COLOUR, augment
from pipeline.data.loading.fetch import BadDataError, BadImages, Encoded, Fetcher

STAND_IN = b"P6 1 1 255\n" + bytes(MEAN_COLOUR)  # a file in PPM's format, of one pixel
T = TypeVar("T")
Source = Callable[[], Any]


@pipeline_def(enable_conditionals=True)  # type: ignore[untyped-decorator]
def _gpu_graph(source: Source, draws: Sequence[str], cfg: DataConfig) -> Any:
    encoded, anchors, shapes, sizes, flips, *values = _inputs(source, 5 + len(draws))
    if cfg.decode_on_gpu:
        load = cfg.hw_decoder_load
        images = fn.decoders.image_slice(encoded, anchors, shapes, axes=[0, 1], device="mixed", hw_decoder_load=load)
    else:
        images = fn.decoders.image_slice(encoded, anchors, shapes, axes=[0, 1], device="cpu").gpu()
    images = fn.resize(images, size=sizes, antialias=True)  # triangular filter, as torch's antialias
    images = fn.flip(images, horizontal=flips)
    return augment(images, {name: values[i] for i, name in enumerate(draws)}, cfg)


@pipeline_def  # type: ignore[untyped-decorator]
def decode_graph(source: Source) -> Any:
    encoded, anchors, shapes = _inputs(source, 3)
    return fn.decoders.image_slice(encoded, anchors, shapes, axes=[0, 1], device="cpu")


@pipeline_def(enable_conditionals=True)  # type: ignore[untyped-decorator]
def _augment_graph(source: Source, draws: Sequence[str], cfg: DataConfig) -> Any:
    images, *values = _inputs(source, 1 + len(draws), layout=["HWC", *("" for _ in draws)])
    return augment(images, {name: values[i] for i, name in enumerate(draws)}, cfg)


def to_decode(request: BatchSpec, encoded: Encoded) -> tuple[Any, ...]:
    """What `decode_graph` takes of a request: of a broken image, one pixel of another."""
    data = [np.frombuffer(one or STAND_IN, dtype=np.uint8) for one in encoded]
    broken = np.array([one is None for one in encoded])[:, None]
    return data, *(np.where(broken, b, a).astype(np.int32) for a, b in ((request.anchors, 0), (request.shapes, 1)))


def _inputs(source: Source, number: int, **options: Any) -> Any:
    return fn.external_source(source=source, num_outputs=number, batch=True, no_copy=True, **options)


class DaliPipeline:
    """Decodes a stream of requests, reading and decoding the next ones while the caller uses one.

    Args:
        max_batch: most images in a request.
        num_threads: CPU threads for decoding.
        patience_s: how long a storage that does not answer is waited for.
        on_bad: called once for each broken image with its place and the reason.
        warn: told what makes reading slow.
    """

    def __init__(
        self,
        index: Index,
        cfg: DataConfig,
        max_batch: int,
        num_threads: int,
        device: torch.device,
        on_bad: Callable[[str, str], None],
        warn: Callable[[str], None],
        patience_s: float,
    ):
        self._cfg, self._device, self._max_batch, self._num_threads = cfg, device, max_batch, num_threads
        self._bad = BadImages(index, cfg.max_bad_fraction, on_bad)
        self._fetcher = Fetcher(index, cfg, self._bad, warn, patience_s)
        self._resizing = _threads(num_threads, "resize")

    def decode(self, requests: Iterator[BatchSpec]) -> Iterator[tuple[BatchSpec, Tensor]]:
        """Yield each request with its (B, 3, size, size) uint8 pixels, channels_last, on the device.

        Raises:
            BadDataError: more broken images than `max_bad_fraction` of the index.
            StorageAwayError: the images' storage does not answer.
        """
        yield from self.pixels(self.read(requests))

    def read(self, requests: Iterator[BatchSpec]) -> Iterator[tuple[BatchSpec, Encoded]]:
        """The first half of `decode`: what is to be decoded."""
        return self._fetcher.prefetch(requests)

    def pixels(self, encoded: Iterator[tuple[BatchSpec, Encoded]]) -> Iterator[tuple[BatchSpec, Tensor]]:
        """The second half of `decode`."""
        first = next(encoded, None)
        if first is None:
            return
        like, encoded = first[0], chain([first], encoded)
        if self._device.type == "cuda":  # DALI works ahead by itself
            for request, images in self._survive(encoded, like):
                yield request, torch.stack(images).permute(0, 3, 1, 2) if isinstance(images, list) else _nchw(images)
            return
        resized = map(self._resize, self._survive(encoded, like))
        yield from _ahead(self._augment(resized, like), self._cfg.prefetch)

    def avoid(self, known: Mapping[int, str]) -> None:
        """From now on take these rows for broken, for the given reasons, without reading them."""
        self._bad.known.update(known)

    def close(self) -> None:
        """End what is being read ahead."""
        self._fetcher.close()
        self._resizing.shutdown(cancel_futures=True)

    def _survive(
        self, encoded_ahead: Iterator[tuple[BatchSpec, Encoded]], like: BatchSpec
    ) -> Iterator[tuple[BatchSpec, Any]]:
        """Each request with what the graph makes of it: DALI's list of images, or a list of tensors."""
        in_flight: deque[tuple[BatchSpec, Encoded]] = deque()

        def source() -> Any:
            in_flight.append(next(encoded_ahead))
            return self._decode_inputs(*in_flight[-1])

        pipe = self._build(source, self._max_batch, like)
        while True:
            try:
                images = self._run(pipe)
            except StopIteration:
                return
            except RuntimeError as e:  # a broken image: redo what the dead pipeline had in flight, then go on anew
                if isinstance(e, BadDataError) or not in_flight:
                    raise
                pipe = self._build(source, self._max_batch, like)
                while in_flight:
                    request, encoded = in_flight.popleft()
                    yield request, self._salvage(request, encoded)
                continue
            yield in_flight.popleft()[0], images

    def _salvage(self, request: BatchSpec, encoded: Encoded) -> list[Tensor]:
        """Decode a request that may hold broken images: by halves, down to the broken ones alone."""
        once = iter([self._decode_inputs(request, encoded)])
        try:
            images = self._run(self._build(lambda: next(once), len(request), request))
            return [from_dlpack(image).clone() for image in images]
        except RuntimeError as e:
            if len(request) == 1:
                self._bad.count(int(request.rows[0]), _reason(e))
                colour = torch.tensor(MEAN_COLOUR, dtype=torch.uint8, device=self._device)
                return [colour.expand(request.size, request.size, 3)]
            half, end = len(request) // 2, len(request)
            halves = [(request.part(a, b), encoded[a:b]) for a, b in ((0, half), (half, end))]
            return [image for part in halves for image in self._salvage(*part)]

    def _decode_inputs(self, request: BatchSpec, encoded: Encoded) -> tuple[Any, ...]:
        inputs = to_decode(request, encoded)
        if self._device.type == "cpu":
            return inputs
        sizes = np.full((len(request), 2), request.size, dtype=np.float32)
        return (*inputs, sizes, request.flips.astype(np.int32), *request.draws.values())

    def _resize(self, decoded: tuple[BatchSpec, Any]) -> tuple[BatchSpec, Tensor]:
        """Images of any size, resized and flipped; each thread takes a part of them."""
        request, images = decoded
        shape = (len(request), 3, request.size, request.size)
        out = torch.empty(shape, dtype=torch.uint8, memory_format=torch.channels_last)

        def part(start: int, stop: int) -> None:
            for i in range(start, stop):
                image = from_dlpack(images[i])[None].permute(0, 3, 1, 2)
                image = F.interpolate(image, out.shape[2:], mode="bilinear", antialias=True)
                out[i] = image[0].flip(2) if request.flips[i] else image[0]

        bounds = np.linspace(0, len(request), self._num_threads + 1).astype(int).tolist()
        list(self._resizing.map(part, bounds[:-1], bounds[1:]))
        return request, out

    def _augment(
        self, resized: Iterator[tuple[BatchSpec, Tensor]], like: BatchSpec
    ) -> Iterator[tuple[BatchSpec, Tensor]]:
        """Images of the final size, augmented as their draws say."""
        if not like.draws:
            yield from resized
            return
        in_flight: deque[tuple[BatchSpec, Tensor]] = deque()  # and so kept in memory, which DALI reads from

        def source() -> Any:
            in_flight.append(next(resized))
            request, images = in_flight[-1]
            return images.permute(0, 2, 3, 1).numpy(), *request.draws.values()

        pipe = self._augmenting(_augment_graph, source, self._max_batch, like)
        while True:
            try:
                images = self._run(pipe)
            except StopIteration:
                return
            yield in_flight.popleft()[0], _nchw(images)

    def _build(self, source: Source, max_batch: int, like: BatchSpec) -> Any:
        """The graph that decodes requests like this one; on a GPU it does all the rest, too."""
        if self._device.type == "cpu":
            return decode_graph(source, **self._options(max_batch))
        return self._augmenting(_gpu_graph, source, max_batch, like)

    def _augmenting(self, graph: Any, source: Source, max_batch: int, like: BatchSpec) -> Any:
        return graph(source, list(like.draws), self._cfg, **self._options(max_batch))

    def _options(self, max_batch: int) -> dict[str, Any]:
        return {
            "batch_size": max_batch,
            "num_threads": self._num_threads,
            "device_id": None if self._device.type == "cpu" else self._device.index or 0,
            "prefetch_queue_depth": self._cfg.prefetch,
        }

    def _run(self, pipe: Any) -> Any:
        """The next batch of a graph: a list of HWC images."""
        (images,) = pipe.run(torch.cuda.current_stream(self._device)) if self._device.type == "cuda" else pipe.run()
        return images


def _ahead(items: Iterator[T], depth: int) -> Iterator[T]:
    """The same items, made by a thread of their own, up to `depth` of them before they are asked for."""
    end: Any = object()
    thread = _threads(1, "decode")
    try:
        waiting = deque(thread.submit(next, items, end) for _ in range(depth))
        while (item := waiting.popleft().result()) is not end:
            waiting.append(thread.submit(next, items, end))
            yield item
    finally:
        thread.shutdown(cancel_futures=True)


def _threads(number: int, name: str) -> ThreadPoolExecutor:
    """Threads that leave the cores alone: torch would start as many more for each, which fight with the network's."""
    return ThreadPoolExecutor(number, name, initializer=torch.set_num_threads, initargs=(1,))


def _nchw(images: Any) -> Tensor:
    """DALI's images of one size, seen as channels_last NCHW. Shares their memory, which lives as long as the tensor."""
    return from_dlpack(images.as_tensor()).permute(0, 3, 1, 2)


def _reason(error: Exception) -> str:
    """What DALI's decoder says, out of the many lines around it."""
    lines = [line.strip() for line in str(error).partition("encountered:")[2].splitlines() if line.strip()]
    return lines[0] if lines else str(error).strip()
