"""From encoded images and draws to uint8 pixels, ahead of need.

What to cut out of each image and what to do with it is decided outside (`batch_spec`) and comes in beside the bytes,
so DALI holds no randomness and no position of its own, and can be thrown away and rebuilt at any moment.
That is how a broken image is survived: DALI's pipeline dies of it, and a new one carries on. What DALI would not even
parse is found out before (`fetch`), and never reaches it.

On a GPU one DALI graph does it all. On the CPU DALI decodes and augments, and torch resizes in between: its uint8
kernel takes a third of the time of DALI's, which was half of the whole (docs/performance.md).
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import starmap
from typing import Any, TypeVar

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def
from torch import Tensor
from torch.nn import functional as F
from torch.utils.dlpack import from_dlpack

from pipeline.config.data import DataConfig
from pipeline.data.batch_spec import BatchSpec
from pipeline.data.index import Index
from pipeline.data.loading.augment import MEAN_COLOUR, augment
from pipeline.data.loading.fetch import BadDataError, BadImages, Encoded, Fetcher

STAND_IN = b"P6 1 1 255\n" + bytes(MEAN_COLOUR)  # a file in PPM's format, of one pixel
T = TypeVar("T")
Source = Iterator[tuple[Any, ...]]  # a graph's inputs, batch by batch


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


def decode_inputs(spec: BatchSpec, encoded: Encoded) -> tuple[Any, ...]:
    """What `decode_graph` takes of a batch: of a broken image, one pixel of another."""
    data = [np.frombuffer(image or STAND_IN, dtype=np.uint8) for image in encoded]
    broken = np.array([image is None for image in encoded])[:, None]
    return data, *(np.where(broken, b, a).astype(np.int32) for a, b in ((spec.anchors, 0), (spec.shapes, 1)))


def _inputs(source: Source, number: int, **options: Any) -> Any:
    return fn.external_source(source=source, num_outputs=number, batch=True, no_copy=True, **options)


class DaliPipeline:
    """Decodes a stream of batches, reading and decoding the next ones while the caller uses one.

    Args:
        max_batch: most images in a batch.
        num_threads: CPU threads for decoding.
        on_bad: called once for each broken image with its path and the reason.
        warn: told what makes reading slow.
        retry_timeout_s: how long a storage that does not answer is waited for.
        draws: the names of the batches' draws.
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
        retry_timeout_s: float,
        draws: Sequence[str] = (),
    ):
        self._cfg, self._device, self._max_batch, self._num_threads = cfg, device, max_batch, num_threads
        self.bad_images = BadImages(index, cfg.max_bad_fraction, on_bad)
        self.fetcher = Fetcher(index, cfg, self.bad_images, warn, retry_timeout_s)
        self._draws, self._resizing = draws, _threads(num_threads, "resize")
        on_gpu = device.type == "cuda"
        device_id = (device.index or 0) if on_gpu else None
        options = {"num_threads": num_threads, "device_id": device_id, "prefetch_queue_depth": cfg.prefetch}
        augmenting = {"draws": draws, "cfg": cfg, **options}
        self._decode_graph = partial(_gpu_graph, **augmenting) if on_gpu else partial(decode_graph, **options)
        self._augment_graph = partial(_augment_graph, **augmenting) if draws else None
        self._stream: Callable[[], Any] = partial(torch.cuda.current_stream, device) if on_gpu else lambda: None

    def decode(self, specs: Iterator[BatchSpec]) -> Iterator[tuple[BatchSpec, Tensor]]:
        """Each batch with its (B, 3, size, size) uint8 pixels, channels_last, on the device.

        Raises:
            BadDataError: more broken images than `max_bad_fraction` of the index.
            StorageAwayError: the images' storage does not answer.
        """
        return self.make_pixels(self.fetcher.prefetch(specs))

    def make_pixels(self, encoded_ahead: Iterator[tuple[BatchSpec, Encoded]]) -> Iterator[tuple[BatchSpec, Tensor]]:
        """The second half of `decode`: of what is read already."""
        decoded = self._decode(encoded_ahead)
        if self._device.type == "cuda":  # DALI works ahead by itself
            return ((spec, _nchw(images)) for spec, images in decoded)
        resized = starmap(self._resize, decoded)
        return _ahead(self._augment(resized) if self._augment_graph else resized, self._cfg.prefetch)

    def close(self) -> None:
        """End what is being read ahead."""
        self.fetcher.close()
        self._resizing.shutdown(cancel_futures=True)

    def _decode(self, encoded_ahead: Iterator[tuple[BatchSpec, Encoded]]) -> Iterator[tuple[BatchSpec, Any]]:
        """Each batch with what the graph makes of it: DALI's list of images, or a list of tensors."""
        in_flight: deque[tuple[BatchSpec, Encoded]] = deque()

        def take(spec: BatchSpec, encoded: Encoded) -> tuple[Any, ...]:
            in_flight.append((spec, encoded))
            return self._graph_inputs(spec, encoded)

        source = starmap(take, encoded_ahead)
        graph = self._decode_graph(source, batch_size=self._max_batch)
        while True:
            try:
                (images,) = graph.run(self._stream())
            except StopIteration:
                return
            except RuntimeError as e:  # a broken image: redo what the dead pipeline had in flight, then go on anew
                if isinstance(e, BadDataError) or not in_flight:
                    raise
                graph = self._decode_graph(source, batch_size=self._max_batch)
                while in_flight:
                    spec, encoded = in_flight.popleft()
                    yield spec, self._salvage(spec, encoded)
                continue
            yield in_flight.popleft()[0], images

    def _salvage(self, spec: BatchSpec, encoded: Encoded) -> list[Tensor]:
        """Decode a batch that may hold broken images: by halves, down to the broken ones alone."""
        try:
            graph = self._decode_graph(iter([self._graph_inputs(spec, encoded)]), batch_size=len(spec))
            (images,) = graph.run(self._stream())
            return [from_dlpack(image).clone() for image in images]
        except RuntimeError as e:
            if len(spec) == 1:
                self.bad_images.count(int(spec.rows[0]), _reason(e))
                colour = torch.tensor(MEAN_COLOUR, dtype=torch.uint8, device=self._device)
                return [colour.expand(spec.size, spec.size, 3)]
            half, end = len(spec) // 2, len(spec)
            halves = [(spec.part(a, b), encoded[a:b]) for a, b in ((0, half), (half, end))]
            return [image for part in halves for image in self._salvage(*part)]

    def _graph_inputs(self, spec: BatchSpec, encoded: Encoded) -> tuple[Any, ...]:
        inputs = decode_inputs(spec, encoded)
        if self._device.type == "cpu":
            return inputs
        sizes = np.full((len(spec), 2), spec.size, dtype=np.float32)
        return (*inputs, sizes, spec.flips.astype(np.int32), *(spec.draws[name] for name in self._draws))

    def _resize(self, spec: BatchSpec, images: Any) -> tuple[BatchSpec, Tensor]:
        """Images of any size, resized and flipped; each thread takes a part of them."""
        shape = (len(spec), 3, spec.size, spec.size)
        resized = torch.empty(shape, dtype=torch.uint8, memory_format=torch.channels_last)

        def resize(start: int, stop: int) -> None:
            for i in range(start, stop):
                image = from_dlpack(images[i])[None].permute(0, 3, 1, 2)
                image = F.interpolate(image, shape[2:], mode="bilinear", antialias=True)
                resized[i] = image[0].flip(2) if spec.flips[i] else image[0]

        bounds = np.linspace(0, len(spec), self._num_threads + 1).astype(int).tolist()
        list(self._resizing.map(resize, bounds[:-1], bounds[1:]))
        return spec, resized

    def _augment(self, resized: Iterator[tuple[BatchSpec, Tensor]]) -> Iterator[tuple[BatchSpec, Tensor]]:
        """Images of the final size, augmented as their draws say."""
        in_flight: deque[tuple[BatchSpec, Tensor]] = deque()  # and so kept in memory, which DALI reads from

        def take(spec: BatchSpec, images: Tensor) -> tuple[Any, ...]:
            in_flight.append((spec, images))
            return images.permute(0, 2, 3, 1).numpy(), *(spec.draws[name] for name in self._draws)

        assert self._augment_graph is not None
        graph = self._augment_graph(starmap(take, resized), batch_size=self._max_batch)
        while True:
            try:
                (images,) = graph.run()
            except StopIteration:
                return
            yield in_flight.popleft()[0], _nchw(images)


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
    """Images of one size, seen as channels_last NCHW. Shares DALI's memory, which lives as long as the tensor."""
    stacked = torch.stack(images) if isinstance(images, list) else from_dlpack(images.as_tensor())
    return stacked.permute(0, 3, 1, 2)


def _reason(error: Exception) -> str:
    """What DALI's decoder says, out of the many lines around it."""
    lines = [line.strip() for line in str(error).partition("encountered:")[2].splitlines() if line.strip()]
    return lines[0] if lines else str(error).strip()
