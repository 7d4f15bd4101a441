"""The loaders that `pipeline bench loader` measures, ours among them: the same images, sizes and batches for each."""

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property, partial
from io import BytesIO
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import v2

from pipeline.config.data import DataConfig
from pipeline.data.batch_spec import TrainSpecs, make_sampler
from pipeline.data.index import Index, load_index
from pipeline.data.loading.dali import decode_graph, decode_inputs
from pipeline.data.loading.fetch import BatchReader
from pipeline.data.loading.loader import LoaderContext, TrainLoader, num_joined
from pipeline.data.loading.read import Reader
from pipeline.failures import READ_SOURCE_S

CPU = torch.device("cpu")
DECODE_BATCHES = 8  # that the decoder alone has in memory
OURS, CEILING = "pipeline", "decode alone"
OPTIONAL = {"SPDL": ("spdl", "spdl-core"), "LitData": ("litdata", "litdata")}  # module, and name on PyPI


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
        joined = num_joined(task.batch, CPU) if self.name == OURS else 1
        return (2 * task.data.prefetch + 2) * joined if self.workers is None else 2 * self.workers  # prefetch_factor

    def total_batches(self, task: Task) -> int:
        return (self.num_ahead(task) + task.num_batches) * task.num_rounds

    def total_images(self, task: Task) -> int:
        return self.total_batches(task) * task.batch


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


def _transform(data: DataConfig, to_tensor: Sequence[Any] = ()) -> Callable[[Any], Any]:
    crop = v2.RandomResizedCrop(data.image_size, scale=data.crop_scale, ratio=data.crop_ratio, antialias=True)
    transform: Callable[[Any], Any] = v2.Compose([crop, v2.RandomHorizontalFlip(data.flip), *to_tensor])
    return transform


def torchvision(
    baseline: LoaderBaseline, task: Task, *, decode: Callable[[bytes], Any], to_tensor: Sequence[Any] = ()
) -> Iterator[Any]:
    loader = DataLoader(
        IndexRows(task, baseline.total_images(task), decode, _transform(task.data, to_tensor)),
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
        IndexRows(task, baseline.total_images(task), _decode_pil, None),
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


def spdl(baseline: LoaderBaseline, task: Task) -> Iterator[Any]:
    """Threads, with torchvision's decoder: SPDL's own needs the libraries of FFmpeg, which pip does not bring."""
    from spdl.pipeline import PipelineBuilder

    torch.set_num_threads(1)  # else each of its threads has as many of torch's
    rows = IndexRows(task, baseline.total_images(task), _decode_uint8, _transform(task.data))
    order = torch.randperm(len(rows)).tolist()
    stages = PipelineBuilder().add_source(order).pipe(rows.__getitem__, concurrency=len(task.cores))
    loader = stages.aggregate(task.batch).pipe(default_collate).add_sink().build(num_threads=len(task.cores))
    with loader.auto_stop():
        yield from (images for images, _ in loader)


def _encoded_row(i: int, *, rows: IndexRows) -> dict[str, Any]:
    data, label = rows[i]
    return {"image": data, "label": label}


def _decoded_row(row: dict[str, Any], *, transform: Callable[[Any], Any]) -> tuple[Any, int]:
    return transform(_decode_uint8(row["image"])), row["label"]


def litdata(baseline: LoaderBaseline, task: Task) -> Iterator[Any]:
    """From chunks of its own, as it wants data to be: the same encoded images, written beforehand."""
    from litdata import StreamingDataLoader, StreamingDataset, optimize

    number, chunks = baseline.total_images(task), str(task.index.parent / f"litdata-{baseline.workers}")
    write = partial(_encoded_row, rows=IndexRows(task, number, bytes, bytes))
    optimize(write, list(range(number)), chunks, chunk_bytes="64MB", num_workers=1, verbose=False)
    transform = partial(_decoded_row, transform=_transform(task.data))
    dataset = StreamingDataset(chunks, shuffle=True, drop_last=True, transform=transform)
    loader = StreamingDataLoader(dataset, batch_size=task.batch, num_workers=baseline.workers or 0, drop_last=True)
    return (images for images, _ in loader)


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
    """All of them that are installed, DataLoaders with each setting that may be their best on so many cores."""
    others: dict[str, Callable[[LoaderBaseline, Task], Iterator[Any]]] = {
        "torchvision PIL": partial(torchvision, decode=_decode_pil, to_tensor=[v2.PILToTensor()]),
        "torchvision uint8": partial(torchvision, decode=_decode_uint8),
        "timm": timm,
        "LitData": litdata,
    }
    settings = [1, 0] if num_cores == 1 else [num_cores]
    baselines = [
        LoaderBaseline(OURS, pipeline_batches),
        LoaderBaseline("SPDL", spdl),
        *(LoaderBaseline(name, batches, workers) for name, batches in others.items() for workers in settings),
        LoaderBaseline(CEILING, decode_alone),
    ]
    return [baseline for baseline in baselines if baseline.name not in missing_packages()]


def missing_packages() -> dict[str, str]:
    """Of loaders that are not installed, the name on PyPI."""
    return {name: package for name, (module, package) in OPTIONAL.items() if importlib.util.find_spec(module) is None}
