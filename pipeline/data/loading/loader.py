"""Batches for training and evaluation: read by other processes, decoded by `dali`, mixed on the device."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from pipeline import machine
from pipeline.config.data import DataConfig
from pipeline.data.augment_params import CENTRE, FIVE
from pipeline.data.batch_spec import BatchSpec, EvalSpecs, Joined, TrainSpecs, draw_names, make_sampler
from pipeline.data.index import Index
from pipeline.data.loading.bad_images import BadImages
from pipeline.data.loading.dali import DaliPipeline
from pipeline.data.loading.mix import mix
from pipeline.data.loading.reader_process import MakeSpec
from pipeline.data.loading.readers import Patience, Readers, for_ever
from pipeline.data.loading.to_device import to_device
from pipeline.data.stream import IntArray, steps_per_epoch


@dataclass(frozen=True)
class Batch:
    """A rank's part of a global batch.

    images: (B, 3, S, S) uint8, channels_last. labels: (B,) int64, or (B, C) float32, the share of each class, where
    images are mixed. drop_path_mask: (B, blocks) factors of the network's residual branches, float32, where some are
    dropped. All on the device. rows: (B,) rows of the index, on the host.
    """

    images: Tensor
    labels: Tensor
    rows: IntArray
    drop_path_mask: Tensor | None = None

    def part(self, start: int, stop: int) -> "Batch":
        """Images [start, stop)."""
        s = slice(start, stop)
        return Batch(
            self.images[s],
            self.labels[s],
            self.rows[s],
            None if self.drop_path_mask is None else self.drop_path_mask[s],
        )

    def split(self, size: int | None) -> list["Batch"]:
        """Parts of nearly equal size, at most `size` images each; None: the whole."""
        number = -(-len(self.rows) // (size or len(self.rows)))
        stops = [len(part) for part in np.array_split(self.rows, number)]
        bounds = np.cumsum([0, *stops]).tolist()
        return [self.part(a, b) for a, b in pairwise(bounds)]


@dataclass(frozen=True)
class LoaderContext:
    """Where a loader works: the rank among how many, the device, the threads for decoding.

    retry_timeout_s: how long it waits for a storage that does not answer.
    """

    rank: int
    world_size: int
    device: torch.device
    num_threads: int
    retry_timeout_s: float = 60.0

    @classmethod
    def here(cls) -> "LoaderContext":
        """All of this machine, for one process."""
        device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
        return cls(rank=0, world_size=1, device=device, num_threads=machine.cpu_count())


MIN_DECODED, MAX_JOINED = 64, 16  # images, and batches for that
Views = Literal["one", "flip", "ten"]
OnBad = Callable[[str, str], None]  # called with a broken image's path and the reason
Warn = Callable[[str], None]


class Loader:
    """Loads batches of at most `max_batch` images of an index. To be closed.

    Args:
        make_spec: what a request is for, by the index.
        on_bad: called once for each broken image.
        warn: told what makes reading slow.
        draws: the names of the batches' draws.
    """

    def __init__(
        self,
        index: Index,
        cfg: DataConfig,
        context: LoaderContext,
        on_bad: OnBad,
        warn: Warn,
        patience: Patience,
        max_batch: int,
        make_spec: MakeSpec,
        draws: Sequence[str] = (),
    ):
        self.index, self.max_batch, self._make_spec = index, max_batch, make_spec
        bad_images = BadImages(index, cfg.max_bad_fraction, on_bad)
        # Rank 0 reads the least ahead: where images stop to come it is the first to wait, and can save the step before.
        num_held = DaliPipeline.num_held(cfg, context.device) + (context.rank > 0)
        self._readers = Readers(index, cfg, make_spec, num_held, bad_images, warn, context.retry_timeout_s, patience)
        self.pipeline = DaliPipeline(cfg, max_batch, context.num_threads, context.device, bad_images, draws)

    def avoid(self, known: Mapping[int, str]) -> None:
        """From now on take these rows for broken, for the given reasons, without reading them."""
        self._readers.avoid(known)

    def close(self) -> None:
        """End its processes and threads."""
        self._readers.close()
        self.pipeline.close()

    def batch_spec(self, request: Any) -> BatchSpec:
        """What a request is for."""
        return self._make_spec(self.index, request)

    def _decode(self, requests: Iterable[Any]) -> Iterator[tuple[BatchSpec, Tensor]]:
        """For each request its pixels (B, 3, S, S), uint8, on the device."""
        return self.pipeline.decode(self._readers.read(requests))


def num_joined(share: int, device: torch.device) -> int:
    """How many batches of so many images are decoded together: on a CPU each batch costs 3 ms beside its images."""
    return max(1, min(MIN_DECODED // share, MAX_JOINED)) if device.type == "cpu" else 1


class TrainLoader(Loader):
    """The training stream of one rank.

    Args:
        on_bad: called once for each broken image.
        drop_rates: of the network's residual blocks (stochastic depth); none where there is none.
        warn: told what makes reading slow.

    Raises:
        UserError: not one whole global batch.
    """

    def __init__(
        self,
        index: Index,
        cfg: DataConfig,
        context: LoaderContext,
        on_bad: OnBad,
        *,
        global_batch: int,
        seed: int,
        drop_rates: Sequence[float] = (),
        warn: Warn = lambda _: None,
        patience: Patience = for_ever,
    ):
        sampler = make_sampler(cfg, len(index), global_batch, seed)
        self._per_epoch = steps_per_epoch(len(index), global_batch)  # refused here, and not by a process that reads
        specs = TrainSpecs(cfg, sampler, context.rank, context.world_size, tuple(drop_rates))
        share = max(sampler.shares(context.world_size))
        self._num_joined = num_joined(share, context.device)
        max_batch = share * self._num_joined
        super().__init__(index, cfg, context, on_bad, warn, patience, max_batch, Joined(specs), draw_names(cfg))
        self._readers.start()

    def from_step(self, step: int, stop: int) -> Iterator[Batch]:
        """This rank's part of global batches [step, stop)."""
        steps = range(step, stop)
        for (spec, images), joined in zip(self._decode(self._joined(steps)), self._joined(steps), strict=True):
            share = len(spec) // len(joined)
            for start in range(0, len(spec), share):
                yield self._make_batch(spec.part(start, start + share), images[start : start + share])

    def batch_spec(self, step: int) -> BatchSpec:
        """What this rank trains on in a step."""
        return super().batch_spec([step])

    def batch_specs(self, steps: Iterable[int]) -> list[BatchSpec]:
        """What this rank decodes at a time for these steps, which rise."""
        return [super(TrainLoader, self).batch_spec(joined) for joined in self._joined(steps)]

    def _joined(self, steps: Iterable[int]) -> Iterator[list[int]]:
        """Steps that are decoded together; in another epoch images may be of another size."""
        joined: list[int] = []
        for step in steps:
            if joined and (len(joined) == self._num_joined or step != joined[-1] + 1 or step % self._per_epoch == 0):
                yield joined
                joined = []
            joined.append(step)
        if joined:
            yield joined

    def _make_batch(self, spec: BatchSpec, images: Tensor) -> Batch:
        labels = to_device(spec.labels, images.device)
        if spec.mixture is not None:
            images, labels = mix(images, labels, *spec.mixture, len(self.index.classes))
        mask = None if spec.drop_path_mask is None else to_device(spec.drop_path_mask, images.device)
        return Batch(images, labels, spec.rows, mask)


class EvalLoader(Loader):
    """Evaluation in chunks that are the same for every world size, so that figures are too.

    Chunk j holds rows [j * batch, (j + 1) * batch); rank r takes chunks r, r + W, r + 2W, ...

    Args:
        views: of each image: its centre ("one"), that and its mirror image ("flip"), or centre and corners with their
            mirror images ("ten", the paper's ten crops).
        specs: what to make of rows; None: those crops.
    """

    def __init__(
        self,
        index: Index,
        cfg: DataConfig,
        context: LoaderContext,
        on_bad: OnBad,
        *,
        batch: int,
        warn: Warn = lambda _: None,
        patience: Patience = for_ever,
        views: Views = "one",
        specs: EvalSpecs | None = None,
    ):
        self._chunk_size, self._mirrored = batch, views != "one"
        self.num_chunks = -(-len(index) // batch)
        self.chunks = range(context.rank, self.num_chunks, context.world_size)
        self.max_chunks = -(-self.num_chunks // context.world_size)  # of any rank
        self._specs = specs or EvalSpecs(cfg, FIVE if views == "ten" else (CENTRE,))
        self._num_places = len(self._specs.places)
        in_sequence = dataclasses.replace(cfg, shuffle_block=batch)  # a reader's cache is of use then, however small
        super().__init__(index, in_sequence, context, on_bad, warn, patience, batch * self._num_places, self._specs)

    def __iter__(self) -> Iterator[tuple[int, Batch]]:
        """(chunk, batch) for this rank's chunks; of several places all their images, see `views`."""
        decoded = self._decode(map(self.rows, self.chunks))
        for chunk, (spec, images) in zip(self.chunks, decoded, strict=True):
            number = len(spec) // self._num_places
            yield chunk, Batch(images, to_device(spec.labels[:number], images.device), spec.rows[:number])

    def rows(self, chunk: int) -> IntArray:
        """The rows of one chunk."""
        return np.arange(chunk * self._chunk_size, min((chunk + 1) * self._chunk_size, len(self.index)))

    def views(self, images: Tensor) -> list[Tensor]:
        """A batch's images as views of the same ones, (B, 3, S, S) each."""
        crops = list(images.chunk(self._num_places))
        return [*crops, *(crop.flip(3) for crop in crops)] if self._mirrored else crops

    def pictures(self, rows: IntArray) -> Tensor:
        """The centre crops of at least one row, as they are evaluated: (N, 3, S, S) uint8, on the host."""
        parts = (rows[i : i + self._chunk_size] for i in range(0, len(rows), self._chunk_size))
        return torch.cat([images[: len(spec) // self._num_places].cpu() for spec, images in self._decode(parts)])
