"""The loaders that `pipeline bench loader` measures, ours among them, each in a process of its own.

All are pinned to the same cores and idle while another is measured: they share no interpreter lock, allocator or
thread pool, and meet the same images, sizes and batches.
"""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property, partial
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

from pipeline.config.data import DataConfig
from pipeline.data.batch_spec import TrainSpecs, make_sampler
from pipeline.data.index import Index, load_index
from pipeline.data.loading.dali import decode_graph, decode_inputs
from pipeline.data.loading.fetch import BatchReader
from pipeline.data.loading.loader import LoaderContext, TrainLoader
from pipeline.data.loading.read import Reader
from pipeline.failures import READ_SOURCE_S

CPU = torch.device("cpu")
DECODE_BATCHES = 8  # that the decoder alone has in memory
IDLE_TIMEOUT_S = 120.0  # for a loader to fall idle after its round
OURS, CEILING = "pipeline", "decode alone"


@dataclass(frozen=True)
class Task:
    """What every loader does. batch: images; num_batches: timed in a round; num_rounds: with the trials."""

    index: Path
    data: DataConfig
    batch: int
    cores: tuple[int, ...]
    num_batches: int
    num_rounds: int


@dataclass(frozen=True)
class LoaderBaseline:
    """One way to load. workers: of torch's DataLoader, 0 for the main process; None: threads, as many as cores."""

    name: str
    batches: Callable[["LoaderBaseline", Task], Iterator[Any]]
    workers: int | None = None

    @property
    def setting(self) -> str:
        return "threads" if self.workers is None else f"num_workers={self.workers}"

    def num_ahead(self, task: Task) -> int:
        """The most batches that lie ready when a round starts, and are not counted."""
        return 2 * task.data.prefetch + 2 if self.workers is None else 2 * self.workers  # DataLoader's prefetch_factor

    def total_batches(self, task: Task) -> int:
        return (self.num_ahead(task) + task.num_batches) * task.num_rounds


class Speed(NamedTuple):
    """Images by time passed, and by the CPU time of all its processes, on which others' load has little influence."""

    per_s: float
    per_cpu_s: float


class IndexRows(Dataset[tuple[Any, int]]):
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


def _decode_pil(data: bytes) -> Image.Image:
    return Image.open(BytesIO(data)).convert("RGB")


def _decode_uint8(data: bytes) -> Any:
    return decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)


def torchvision(
    baseline: LoaderBaseline, task: Task, *, decode: Callable[[bytes], Any], to_tensor: Sequence[Any] = ()
) -> Iterator[Any]:
    crop = v2.RandomResizedCrop(
        task.data.image_size, scale=task.data.crop_scale, ratio=task.data.crop_ratio, antialias=True
    )
    transform = v2.Compose([crop, v2.RandomHorizontalFlip(task.data.flip), *to_tensor])
    loader = DataLoader(
        IndexRows(task, baseline.total_batches(task) * task.batch, decode, transform),
        task.batch,
        shuffle=True,
        num_workers=baseline.workers or 0,
        persistent_workers=bool(baseline.workers),
        drop_last=True,
    )
    return (images for images, _ in loader)


def timm(baseline: LoaderBaseline, task: Task) -> Iterator[Any]:
    from timm.data import create_loader

    loader = create_loader(
        IndexRows(task, baseline.total_batches(task) * task.batch, _decode_pil, None),
        task.data.image_size,
        task.batch,
        is_training=True,
        scale=task.data.crop_scale,
        ratio=task.data.crop_ratio,
        hflip=task.data.flip,
        color_jitter=None,
        interpolation="bilinear",
        num_workers=baseline.workers,
        device=CPU,
    )
    return (images for images, _ in loader.loader)  # beneath its normalisation, which is the model's with us


def pipeline_batches(baseline: LoaderBaseline, task: Task) -> Iterator[Any]:
    return (batch.images for batch in _train_loader(task).from_step(0, baseline.total_batches(task)))


def decode_alone(baseline: LoaderBaseline, task: Task) -> Iterator[Any]:
    """The same crops decoded and nothing else, from memory: what no CPU loader on this decoder gets past."""
    index = load_index(task.index)
    make_spec = TrainSpecs(task.data, make_sampler(task.data, len(index), task.batch, seed=0), rank=0, world_size=1)
    with closing(BatchReader(index, task.data, lambda _: None, READ_SOURCE_S)) as reader:
        specs = [make_spec(index, step) for step in range(min(DECODE_BATCHES, baseline.total_batches(task)))]
        batches = cycle([reader.read(spec, lambda size: memoryview(bytearray(size))) for spec in specs])
    pipe = decode_graph(
        lambda: decode_inputs(next(batches)),
        batch_size=task.batch,
        num_threads=len(task.cores),
        device_id=None,
        prefetch_queue_depth=task.data.prefetch,
    )
    return (pipe.run()[0] for _ in range(baseline.total_batches(task)))


def _train_loader(task: Task) -> TrainLoader:
    def refuse(path: str, reason: str) -> None:
        raise RuntimeError(f"{path} is broken ({reason}), which not all loaders survive; leave it out of the index")

    context = LoaderContext(0, 1, CPU, len(task.cores))
    return TrainLoader(load_index(task.index), task.data, context, refuse, global_batch=task.batch, seed=0)


def loader_baselines(num_cores: int) -> list[LoaderBaseline]:
    """All of them, DataLoaders with each setting that may be their best on so many cores."""
    others: dict[str, Callable[[LoaderBaseline, Task], Iterator[Any]]] = {
        "torchvision PIL": partial(torchvision, decode=_decode_pil, to_tensor=[v2.PILToTensor()]),
        "torchvision uint8": partial(torchvision, decode=_decode_uint8),
        "timm": timm,
    }
    settings = [1, 0] if num_cores == 1 else [num_cores]
    return [
        LoaderBaseline(OURS, pipeline_batches),
        *(LoaderBaseline(name, batches, workers) for name, batches in others.items() for workers in settings),
        LoaderBaseline(CEILING, decode_alone),
    ]


class LoaderProcess:
    """A loader in its process, which works in its own rounds alone."""

    def __init__(self, baseline: LoaderBaseline, task: Task):
        self.baseline = baseline
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_run_loader, args=(baseline, task, theirs))
        allowed = os.sched_getaffinity(0)
        os.sched_setaffinity(0, task.cores)  # inherited, also by the threads that start with an import
        try:
            self._process.start()
        finally:
            os.sched_setaffinity(0, allowed)
        theirs.close()

    def run_round(self) -> Speed:
        """Work one round.

        Raises:
            RuntimeError: the process has died; its own error is on stderr.
        """
        try:
            self._pipe.send(None)
            speed: Speed = self._pipe.recv()
        except (EOFError, ConnectionError):
            raise RuntimeError(f"the loader {self.baseline.name!r} has failed, see above") from None
        return speed

    def end(self) -> None:
        self._pipe.close()
        self._process.join(10)
        self._process.kill()
        self._process.join()


def _run_loader(baseline: LoaderBaseline, task: Task, pipe: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's affair, which closes the pipe
    torch.set_num_threads(len(task.cores))
    batches, process = baseline.batches(baseline, task), psutil.Process()
    while True:
        try:
            pipe.recv()
        except EOFError:
            return
        for _ in range(baseline.num_ahead(task)):
            next(batches)
        started, used = time.perf_counter(), _cpu_seconds(process)
        num_images = sum(len(next(batches)) for _ in range(task.num_batches))
        seconds, cpu_seconds = time.perf_counter() - started, _cpu_seconds(process) - used
        _wait_until_idle(process)
        pipe.send(Speed(num_images / seconds, num_images / max(cpu_seconds, 0.01)))  # which is told in 10 ms


def _wait_until_idle(process: psutil.Process) -> None:
    """Wait until what is made ahead is made, so that the next loader has the cores for itself."""
    deadline = time.monotonic() + IDLE_TIMEOUT_S
    used, before = _cpu_seconds(process), -1.0
    while used - before > 0.02:
        if time.monotonic() > deadline:
            raise RuntimeError(f"still at work {IDLE_TIMEOUT_S:.0f} s after its round")
        time.sleep(0.2)
        before, used = used, _cpu_seconds(process)


def _cpu_seconds(process: psutil.Process) -> float:
    return float(sum(sum(p.cpu_times()[:2]) for p in [process, *process.children(recursive=True)]))
