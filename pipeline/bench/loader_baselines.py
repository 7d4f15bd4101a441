"""The loaders that `pipeline bench loader` measures, ours among them, each in a process of its own.

All are pinned to the same cores and idle while another is measured: they share no interpreter lock, allocator or
thread pool, and meet the same images, sizes and batches.
"""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from itertools import cycle
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import v2

from pipeline.config.schema import DataConfig
from pipeline.data.index import Index, load_index
from pipeline.data.loading.dali import decode_graph, decode_inputs
from pipeline.data.loading.loader import LoaderContext, TrainLoader
from pipeline.data.loading.read import Reader

CPU = torch.device("cpu")
DECODE_BATCHES = 8  # that the decoder alone has in memory
PATIENCE_S = 120.0  # for a contestant to fall idle after its round
OURS, CEILING = "pipeline", "decode alone"


@dataclass(frozen=True)
class Task:
    """What every contestant does. batch: images; num_batches: timed in a round; num_rounds: with the trials."""

    index: Path
    data: DataConfig
    batch: int
    cores: tuple[int, ...]
    num_batches: int
    num_rounds: int


@dataclass(frozen=True)
class Contestant:
    """One way to load. workers: of torch's DataLoader, 0 for the main process; None: threads, as many as cores."""

    name: str
    batches: Callable[["Contestant", Task], Iterator[Any]]
    workers: int | None = None

    @property
    def setting(self) -> str:
        return "threads" if self.workers is None else f"num_workers={self.workers}"

    def num_ahead(self, task: Task) -> int:
        """The most batches that lie ready when a round starts, and are not counted."""
        return 2 * task.data.prefetch + 2 if self.workers is None else 2 * self.workers  # DataLoader's prefetch_factor

    def total(self, task: Task) -> int:
        return (self.num_ahead(task) + task.num_batches) * task.num_rounds


class Speed(NamedTuple):
    """Images by time passed, and by the CPU time of all its processes, on which others' load has little influence."""

    per_s: float
    per_cpu_s: float


class Rows(Dataset[tuple[Any, int]]):
    """An index's rows, over and over until `length`, for the loaders that are not ours."""

    def __init__(self, task: Task, length: int, decode: Callable[[bytes], Any], transform: Callable[[Any], Any] | None):
        self._task, self._length, self._decode = task, length, decode
        self.transform = transform  # timm sets it

    @cached_property
    def _source(self) -> tuple[Index, Reader]:  # each worker opens it for itself
        index = load_index(self._task.index)
        return index, Reader(index, self._task.data)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, i: int) -> tuple[Any, int]:
        index, reader = self._source
        row = i % len(index)
        assert self.transform is not None
        return self.transform(self._decode(reader.read(row))), int(index.labels[row])


def _pil(data: bytes) -> Image.Image:
    return Image.open(BytesIO(data)).convert("RGB")


def _tensor(data: bytes) -> torch.Tensor:
    image: torch.Tensor = decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)
    return image


def _crop_and_flip(data: DataConfig) -> list[Any]:
    crop = v2.RandomResizedCrop(data.image_size, scale=data.crop_scale, ratio=data.crop_ratio, antialias=True)
    return [crop, v2.RandomHorizontalFlip(data.flip)]


def _torchvision(one: Contestant, task: Task, rows: Rows) -> Iterator[Any]:
    loader = DataLoader(
        rows,
        task.batch,
        shuffle=True,
        num_workers=one.workers or 0,
        persistent_workers=bool(one.workers),
        drop_last=True,
    )
    return (images for images, _ in loader)


def torchvision_pil(one: Contestant, task: Task) -> Iterator[Any]:
    transform = v2.Compose([*_crop_and_flip(task.data), v2.PILToTensor()])
    return _torchvision(one, task, Rows(task, one.total(task) * task.batch, _pil, transform))


def torchvision_uint8(one: Contestant, task: Task) -> Iterator[Any]:
    transform = v2.Compose(_crop_and_flip(task.data))
    return _torchvision(one, task, Rows(task, one.total(task) * task.batch, _tensor, transform))


def timm(one: Contestant, task: Task) -> Iterator[Any]:
    from timm.data import create_loader

    loader = create_loader(
        Rows(task, one.total(task) * task.batch, _pil, None),
        task.data.image_size,
        task.batch,
        is_training=True,
        scale=task.data.crop_scale,
        ratio=task.data.crop_ratio,
        hflip=task.data.flip,
        color_jitter=None,
        interpolation="bilinear",
        num_workers=one.workers,
        device=CPU,
    )
    return (images for images, _ in loader.loader)  # beneath its normalisation, which is the model's with us


def ours(one: Contestant, task: Task) -> Iterator[Any]:
    stream = _stream(task).from_step(0, one.total(task))
    return (batch.images for batch in stream)


def decode_alone(one: Contestant, task: Task) -> Iterator[Any]:
    """The same crops decoded and nothing else, from memory: what no CPU loader on this decoder gets past."""
    stream, reader = _stream(task), Reader(load_index(task.index), task.data)
    specs = [stream.batch_spec(step) for step in range(min(DECODE_BATCHES, one.total(task)))]
    inputs = [decode_inputs(spec, [reader.read(int(row)) for row in spec.rows]) for spec in specs]
    reader.close()
    pipe = decode_graph(
        cycle(inputs),
        batch_size=task.batch,
        num_threads=len(task.cores),
        device_id=None,
        prefetch_queue_depth=task.data.prefetch,
    )
    return (pipe.run()[0] for _ in range(one.total(task)))


def _stream(task: Task) -> TrainLoader:
    def refuse(path: str, reason: str) -> None:
        raise RuntimeError(f"{path} is broken ({reason}), which not all loaders survive; leave it out of the index")

    place = LoaderContext(0, 1, CPU, len(task.cores))
    return TrainLoader(load_index(task.index), task.data, place, refuse, global_batch=task.batch, seed=0)


def contestants(num_cores: int) -> list[Contestant]:
    """All of them, DataLoaders with each setting that may be their best on so many cores."""
    others = {"torchvision PIL": torchvision_pil, "torchvision uint8": torchvision_uint8, "timm": timm}
    settings = [1, 0] if num_cores == 1 else [num_cores]
    return [
        Contestant(OURS, ours),
        *(Contestant(name, batches, workers) for name, batches in others.items() for workers in settings),
        Contestant(CEILING, decode_alone),
    ]


class Running:
    """A contestant in its process, which works in its own rounds alone."""

    def __init__(self, one: Contestant, task: Task):
        self.one = one
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(one, task, theirs))
        allowed = os.sched_getaffinity(0)
        os.sched_setaffinity(0, task.cores)  # inherited, also by the threads that start with an import
        try:
            self._process.start()
        finally:
            os.sched_setaffinity(0, allowed)
        theirs.close()

    def round(self) -> Speed:
        """Work one round.

        Raises:
            RuntimeError: the process has died; its own error is on stderr.
        """
        try:
            self._pipe.send(None)
            speed: Speed = self._pipe.recv()
        except (EOFError, ConnectionError):
            raise RuntimeError(f"the loader {self.one.name!r} has failed, see above") from None
        return speed

    def end(self) -> None:
        self._pipe.close()
        self._process.join(10)
        self._process.kill()
        self._process.join()


def _serve(one: Contestant, task: Task, pipe: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's affair, which closes the pipe
    torch.set_num_threads(len(task.cores))
    batches, me = one.batches(one, task), psutil.Process()
    while True:
        try:
            pipe.recv()
        except EOFError:
            return
        for _ in range(one.num_ahead(task)):
            next(batches)
        started, used = time.perf_counter(), _cpu_seconds(me)
        num_images = sum(len(next(batches)) for _ in range(task.num_batches))
        seconds, cpu_seconds = time.perf_counter() - started, _cpu_seconds(me) - used
        _fall_idle(me)
        pipe.send(Speed(num_images / seconds, num_images / max(cpu_seconds, 0.01)))  # which is told in 10 ms


def _fall_idle(me: psutil.Process) -> None:
    """Wait until what is made ahead is made, so that the next contestant has the cores for itself."""
    deadline = time.monotonic() + PATIENCE_S
    used, before = _cpu_seconds(me), -1.0
    while used - before > 0.02:
        if time.monotonic() > deadline:
            raise RuntimeError(f"still at work {PATIENCE_S:.0f} s after its round")
        time.sleep(0.2)
        before, used = used, _cpu_seconds(me)


def _cpu_seconds(process: psutil.Process) -> float:
    return float(sum(sum(p.cpu_times()[:2]) for p in [process, *process.children(recursive=True)]))
