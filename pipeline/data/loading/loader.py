"""Batches for training and evaluation: what `batch_spec` asks for, decoded by `dali`, mixed on the device."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, starmap
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from pipeline import machine
from pipeline.config.data import DataConfig
from pipeline.data.augment_params import CENTRE, FIVE, drop_path_masks
from pipeline.data.batch_spec import BatchSpec, draw_names, make_eval_spec, make_sampler, make_train_spec
from pipeline.data.index import Index
from pipeline.data.loading.dali import DaliPipeline
from pipeline.data.loading.mix import mix
from pipeline.data.stream import IntArray, Purpose, uniforms


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


Views = Literal["one", "flip", "ten"]
OnBad = Callable[[str, str], None]  # called with a broken image's path and the reason
Warn = Callable[[str], None]


class Loader:
    """Decodes batches of at most `max_batch` images of an index."""

    def __init__(
        self,
        index: Index,
        cfg: DataConfig,
        context: LoaderContext,
        on_bad: OnBad,
        warn: Warn,
        max_batch: int,
        draws: Sequence[str] = (),
    ):
        self.index, self._cfg, self._context, self.max_batch = index, cfg, context, max_batch
        self.pipeline = DaliPipeline(
            index,
            cfg,
            max_batch,
            num_threads=context.num_threads,
            device=context.device,
            on_bad=on_bad,
            warn=warn,
            retry_timeout_s=context.retry_timeout_s,
            draws=draws,
        )

    def avoid(self, known: Mapping[int, str]) -> None:
        """From now on take these rows for broken, for the given reasons, without reading them."""
        self.pipeline.bad_images.known.update(known)

    def close(self) -> None:
        """End its threads."""
        self.pipeline.close()

    def _labels(self, rows: IntArray, device: torch.device) -> Tensor:
        return torch.from_numpy(self.index.labels[rows].astype(np.int64)).to(device, non_blocking=True)


class TrainLoader(Loader):
    """The training stream of one rank.

    Args:
        on_bad: called once for each broken image.
        drop_rates: of the network's residual blocks (stochastic depth); none where there is none.
        warn: told what makes reading slow.
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
    ):
        self._sampler, self._drop_rates = make_sampler(cfg, len(index), global_batch, seed), drop_rates
        max_batch = self._sampler.largest_share(context.world_size)
        super().__init__(index, cfg, context, on_bad, warn, max_batch, draw_names(cfg))

    def from_step(self, step: int, stop: int) -> Iterator[Batch]:
        """This rank's part of global batches [step, stop)."""
        steps = range(step, stop)
        decoded = self.pipeline.decode(map(self.batch_spec, steps))
        return starmap(self._make_batch, zip(steps, decoded, strict=True))

    def batch_spec(self, step: int) -> BatchSpec:
        """What this rank trains on in `step`: a pure function of seed, step and index."""
        rank, world_size = self._context.rank, self._context.world_size
        return make_train_spec(self.index, self._cfg, self._sampler, step, rank, world_size)

    def _make_batch(self, step: int, decoded: tuple[BatchSpec, Tensor]) -> Batch:
        spec, images = decoded
        labels = self._labels(spec.rows, images.device)
        if spec.mixture is not None:
            images, labels = mix(images, labels, *spec.mixture, len(self.index.classes))
        return Batch(images, labels, spec.rows, self._drop_path_mask(step, images.device) if self._drop_rates else None)

    def _drop_path_mask(self, step: int, device: torch.device) -> Tensor:
        epoch, start, stop = self._sampler.positions(step, self._context.rank, self._context.world_size)
        draws = uniforms(Purpose.DROP_PATH, self._sampler.seed, epoch, start, stop, len(self._drop_rates))
        mask = torch.from_numpy(drop_path_masks(self._drop_rates, draws).astype(np.float32))
        return mask.to(device, non_blocking=True)


class EvalLoader(Loader):
    """Evaluation in chunks that are the same for every world size, so that figures are too.

    Chunk j holds rows [j * batch, (j + 1) * batch); rank r takes chunks r, r + W, r + 2W, ...

    Args:
        views: of each image: its centre ("one"), that and its mirror image ("flip"), or centre and corners with their
            mirror images ("ten", the paper's ten crops).
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
        views: Views = "one",
    ):
        self._chunk_size, self._places, self._mirrored = batch, FIVE if views == "ten" else (CENTRE,), views != "one"
        self.num_chunks = -(-len(index) // batch)
        self.chunks = range(context.rank, self.num_chunks, context.world_size)
        self.max_chunks = -(-self.num_chunks // context.world_size)  # of any rank
        in_sequence = dataclasses.replace(cfg, shuffle_block=batch)  # a reader's cache is of use then, however small
        super().__init__(index, in_sequence, context, on_bad, warn, batch * len(self._places))

    def __iter__(self) -> Iterator[tuple[int, Batch]]:
        """(chunk, batch) for this rank's chunks; of several places all their images, see `views`."""
        decoded = self.pipeline.decode(map(self.batch_spec, self.chunks))
        for chunk, (spec, images) in zip(self.chunks, decoded, strict=True):
            rows = spec.rows[: len(spec) // len(self._places)]
            yield chunk, Batch(images, self._labels(rows, images.device), rows)

    def batch_spec(self, chunk: int) -> BatchSpec:
        """The crops of one chunk."""
        rows = np.arange(chunk * self._chunk_size, min((chunk + 1) * self._chunk_size, len(self.index)))
        return make_eval_spec(self.index, self._cfg, rows, self._places)

    def views(self, images: Tensor) -> list[Tensor]:
        """A batch's images as views of the same ones, (B, 3, S, S) each."""
        crops = list(images.chunk(len(self._places)))
        return [*crops, *(crop.flip(3) for crop in crops)] if self._mirrored else crops

    def pictures(self, rows: IntArray) -> Tensor:
        """The centre crops of at least one row, as they are evaluated: (N, 3, S, S) uint8, on the host."""
        parts = [rows[i : i + self._chunk_size] for i in range(0, len(rows), self._chunk_size)]
        specs = (make_eval_spec(self.index, self._cfg, part) for part in parts)
        return torch.cat([images.cpu() for _, images in self.pipeline.decode(specs)])
