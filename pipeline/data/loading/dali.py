"""From encoded images and draws to uint8 pixels, ahead of need.

What to cut out of each image and what to do with it is decided outside (`batch_spec`) and comes in beside the bytes,
so DALI holds no randomness and no position of its own, and can be thrown away and rebuilt at any moment.
That is how a broken image is survived: DALI's pipeline dies of it, and a new one carries on. What DALI would not even
parse is found out before (`fetch`), and never reaches it. Bytes are not copied: DALI reads the memory that the reader
processes have written.

On a GPU one DALI graph does it all. On the CPU DALI decodes and augments, and torch resizes in between: its uint8
kernel takes a third of the time of DALI's, which was half of the whole (docs/performance.md).
"""

import io
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import starmap
from typing import Any, TypeVar

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils.dlpack import from_dlpack

from pipeline.config.data import DataConfig
from pipeline.data.batch_spec import BatchSpec
from pipeline.data.loading.augment import augment
from pipeline.data.loading.bad_images import BadDataError, BadImages
from pipeline.data.loading.fetch import MEAN_COLOUR, EncodedBatch
from pipeline.data.loading.graph import Graph, Source
from pipeline.data.loading.held import MAX_BEHIND, HeldWhileRead
from pipeline.data.loading.readers import ReaderError

T = TypeVar("T")


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


def decode_inputs(batch: EncodedBatch) -> tuple[Any, ...]:
    """What `decode_graph` takes of a batch.

    Images as DLPack's capsules: DALI takes these in 0.6 of the time that it takes for arrays.
    """
    images = [image.__dlpack__() for image in batch.images]
    return images, batch.spec.anchors.astype(np.int32), batch.spec.shapes.astype(np.int32)


def gpu_inputs(batch: EncodedBatch, draws: Sequence[str]) -> tuple[Any, ...]:
    """What the graph for GPUs takes of a batch."""
    spec = batch.spec
    sizes = np.full((len(spec), 2), spec.size, dtype=np.float32)
    return (*decode_inputs(batch), sizes, spec.flips.astype(np.int32), *(spec.draws[name] for name in draws))


def _inputs(source: Source, number: int, **options: Any) -> Any:
    return fn.external_source(source=source, num_outputs=number, batch=True, no_copy=True, **options)


class DaliPipeline:
    """Decodes streams of batches, the next ones while the caller uses one. To be closed.

    Args:
        max_batch: most images in a batch.
        num_threads: CPU threads for decoding.
        bad_images: counts what cannot be decoded.
        draws: the names of the batches' draws.
    """

    def __init__(
        self,
        cfg: DataConfig,
        max_batch: int,
        num_threads: int,
        device: torch.device,
        bad_images: BadImages,
        draws: Sequence[str] = (),
    ):
        self._cfg, self._device, self._max_batch, self._num_threads = cfg, device, max_batch, num_threads
        self._bad_images, self._draws, self._resizing = bad_images, draws, _threads(num_threads, "resize")
        on_gpu = device.type == "cuda"
        device_id = (device.index or 0) if on_gpu else None
        options = {"num_threads": num_threads, "device_id": device_id, "prefetch_queue_depth": cfg.prefetch}
        augmenting = {"draws": draws, "cfg": cfg, **options}
        self._decode_graph = partial(_gpu_graph, **augmenting) if on_gpu else partial(decode_graph, **options)
        self._augment_graph = partial(_augment_graph, **augmenting) if draws else None
        self._stream: Callable[[], Any] = partial(torch.cuda.current_stream, device) if on_gpu else lambda: None
        self._mark: Callable[[], Any] = (lambda: self._stream().record_event()) if on_gpu else lambda: None
        self._idle: Graph[EncodedBatch] | None = None  # to be used again: building one takes up to seconds

    @staticmethod
    def num_held(cfg: DataConfig, device: torch.device) -> int:
        """How many batches it reads from when it takes another one."""
        return cfg.prefetch + (MAX_BEHIND if device.type == "cuda" else 0)

    def decode(self, batches: Iterator[EncodedBatch]) -> Iterator[tuple[BatchSpec, Tensor]]:
        """Each batch with its (B, 3, size, size) uint8 pixels, channels_last, on the device.

        Raises:
            BadDataError: more broken images than `max_bad_fraction` of the index.
            RuntimeError: of the device, such as a lack of memory.
        """
        decoded = self._decode(batches)
        if self._device.type == "cuda":  # DALI works ahead by itself
            return ((spec, _nchw(images)) for spec, images in decoded)
        resized = starmap(self._resize, decoded)
        return _ahead(self._augment(resized) if self._augment_graph else resized, self._cfg.prefetch)

    def close(self) -> None:
        self._resizing.shutdown(cancel_futures=True)
        if self._idle is not None:
            self._idle.close()

    def _decode(self, batches: Iterator[EncodedBatch]) -> Iterator[tuple[BatchSpec, Any]]:
        """Each batch with what the graph makes of it: DALI's list of images, or a list of tensors."""
        graph, self._idle = self._idle or self._new_graph(self._max_batch), None
        graph.begin(batches)
        held, lost, current = HeldWhileRead(self._mark), deque[EncodedBatch](), list[EncodedBatch]()
        try:
            while True:
                try:
                    batch, images = graph.run(self._stream())
                except StopIteration:
                    return
                except RuntimeError as e:
                    if isinstance(e, (BadDataError, ReaderError)) or not graph.in_flight:
                        raise
                    lost = graph.in_flight
                if lost:  # a broken image: redo what the dead graph had in flight, then go on anew
                    graph.close()
                    graph = self._new_graph(self._max_batch)
                    graph.begin(batches)
                    while lost:
                        yield lost[0].spec, self._salvage(lost[0])
                        lost.popleft().release()
                    continue
                current.append(batch)
                yield batch.spec, images
                held.add(current.pop(), images)  # by now all is launched that reads these images
        except Exception:
            graph.close()
            raise
        finally:
            self._retire(graph, [*held.batches, *current, *lost])

    def _retire(self, graph: "Graph[EncodedBatch]", held: list[EncodedBatch]) -> None:
        """Keep a graph for the next stream; the batches that are held are read no more."""
        held = [*held, *graph.in_flight]
        try:
            if not graph.closed:
                graph.finish()
                self._idle = graph
        except RuntimeError:  # of a broken image that nobody waits for
            graph.close()
        if held and self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        for batch in held:
            batch.release()

    def _new_graph(self, max_batch: int) -> "Graph[EncodedBatch]":
        inputs = decode_inputs if self._device.type == "cpu" else partial(gpu_inputs, draws=self._draws)
        return Graph(partial(self._decode_graph, batch_size=max_batch), inputs)

    def _salvage(self, batch: EncodedBatch) -> list[Tensor]:
        """Decode a batch that may hold broken images: by halves, down to the broken ones alone.

        Raises:
            RuntimeError: a sound image cannot be decoded either, for a lack of memory or a fault of the device.
        """
        spec = batch.spec
        if isinstance(images := self._try(batch), list):
            return images
        if len(spec) > 1:
            half, end = len(spec) // 2, len(spec)
            return [image for a, b in ((0, half), (half, end)) for image in self._salvage(batch.part(a, b))]
        row = int(spec.rows[0])
        if isinstance(trouble := self._try(_sound(spec)), str):
            path = self._bad_images.path(row)
            raise RuntimeError(f"{path}: neither this nor a sound image of its size can be decoded: {trouble}")
        if isinstance(images := self._try(batch), list):  # a GPU's memory may have been full for a moment
            return images
        self._bad_images.count(row, images)
        colour = torch.tensor(MEAN_COLOUR, dtype=torch.uint8, device=self._device)
        return [colour.expand(spec.size, spec.size, 3)]

    def _try(self, batch: EncodedBatch) -> list[Tensor] | str:
        """A batch's images, by a graph of its own, or what keeps it from being decoded."""
        graph = self._new_graph(len(batch.spec))
        graph.begin(iter([batch]))
        try:
            _, images = graph.run(self._stream())
            copies = [from_dlpack(image).clone() for image in images]
            if self._device.type == "cuda":  # the graph's memory goes with it
                torch.cuda.synchronize(self._device)
            return copies
        except RuntimeError as e:  # it holds the dead graph, and ends here
            return _reason(e)
        finally:
            graph.close()

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

        def inputs(item: tuple[BatchSpec, Tensor]) -> tuple[Any, ...]:
            spec, images = item
            return images.permute(0, 2, 3, 1).numpy(), *(spec.draws[name] for name in self._draws)

        assert self._augment_graph is not None
        graph = Graph(partial(self._augment_graph, batch_size=self._max_batch), inputs)
        graph.begin(resized)
        try:
            while True:
                (spec, _), images = graph.run()
                yield spec, _nchw(images)
        except StopIteration:
            return
        finally:
            graph.close()


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


def _sound(spec: BatchSpec) -> EncodedBatch:
    """A sound image in place of the only one, as large as what is cut out of it needs."""
    height, width = (spec.anchors[0] + spec.shapes[0]).tolist()
    file = io.BytesIO()
    Image.new("RGB", (width, height)).save(file, "JPEG" if max(height, width) < 65500 else "PNG")
    data = np.frombuffer(file.getbuffer(), np.uint8)
    return EncodedBatch(spec, data, np.array([0]), np.array([len(data)]), {})


def _reason(error: Exception) -> str:
    """What DALI's decoder says, out of the many lines around it."""
    lines = [line.strip() for line in str(error).partition("encountered:")[2].splitlines() if line.strip()]
    reason = lines[0] if lines else str(error).strip()
    return reason.removeprefix("Failed to decode sample #0 :").strip() or "it cannot be decoded"  # decoded alone
