"""Batches for training and evaluation: what `request` asks for, decoded by `dali`, mixed on the device."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from pipeline import machine
from pipeline.config.schema import DataConfig
from pipeline.data import batch_spec
from pipeline.data.augment_params import CENTRE, FIVE, drop_path_masks
from pipeline.data.batch_spec import BatchSpec
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

    patience_s: how long it waits for a storage that does not answer.
    """

    rank: int
    world_size: int
    device: torch.device
    num_threads: int
    patience_s: float = 60.0

    @classmethod
    def here(cls) -> "LoaderContext":
        """All of this machine, for one process."""
        device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
        return cls(rank=0, world_size=1, device=device, num_threads=machine.cpu_count())


Views = Literal["one", "flip", "ten"]
OnBad = Callable[[str, str], None]  # called with a broken image's place and the reason
Warn = Callable[[str], None]


class TrainLoader:
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
        place: LoaderContext,
        on_bad: OnBad,
        *,
        global_batch: int,
        seed: int,
        drop_rates: Sequence[float] = (),
        warn: Warn = lambda _: None,
    ):
        self.index, self._cfg, self._context = index, cfg, place
        self._drop_rates = drop_rates
        self._order = batch_spec.stream(cfg, len(index), global_batch, seed)
        self.max_batch = self._order.largest_share(place.world_size)
        self._decoder = _decoder(index, cfg, self.max_batch, place, on_bad, warn)

    def from_step(self, step: int, stop: int) -> Iterator[Batch]:
        """This rank's part of global batches [step, stop)."""
        steps, requests = range(step, stop), (self.request(s) for s in range(step, stop))
        for s, (asked, images) in zip(steps, self._decoder.decode(requests), strict=True):
            batch = _batch(self.index, asked, images)
            if asked.mixture is not None:
                mixed = mix(batch.images, batch.labels, *asked.mixture, len(self.index.classes))
                batch = Batch(*mixed, batch.rows)
            yield dataclasses.replace(batch, drop_path_mask=self._kept(s, images.device)) if self._drop_rates else batch

    def _kept(self, step: int, device: torch.device) -> Tensor:
        epoch, start, stop = self._order.positions(step, self._context.rank, self._context.world_size)
        drawn = uniforms(Purpose.DROP_PATH, self._order.seed, epoch, start, stop, len(self._drop_rates))
        factors = torch.from_numpy(drop_path_masks(self._drop_rates, drawn).astype(np.float32))
        return factors.to(device, non_blocking=True)

    def avoid(self, known: Mapping[int, str]) -> None:
        """From now on take these rows for broken, for the given reasons, without reading them."""
        self._decoder.avoid(known)

    def close(self) -> None:
        """End its threads."""
        self._decoder.close()

    def request(self, step: int) -> BatchSpec:
        """What this rank trains on in `step`: a pure function of seed, step and index."""
        return batch_spec.to_train(
            self.index, self._cfg, self._order, step, self._context.rank, self._context.world_size
        )


class EvalLoader:
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
        place: LoaderContext,
        on_bad: OnBad,
        *,
        batch: int,
        warn: Warn = lambda _: None,
        views: Views = "one",
    ):
        self.index, self._cfg, self._batch = index, cfg, batch
        self._places, self._mirrored = FIVE if views == "ten" else (CENTRE,), views != "one"
        self.num_chunks = -(-len(index) // batch)
        self.chunks = range(place.rank, self.num_chunks, place.world_size)
        self.max_chunks = -(-self.num_chunks // place.world_size)  # of any rank
        in_sequence = dataclasses.replace(cfg, shuffle_block=batch)  # a reader's cache is of use then, however small
        self.max_batch = batch * len(self._places)
        self._decoder = _decoder(index, in_sequence, self.max_batch, place, on_bad, warn)

    def __iter__(self) -> Iterator[tuple[int, Batch]]:
        """(chunk, batch) for this rank's chunks; of several places all their images, see `views`."""
        decoded = self._decoder.decode(map(self.request, self.chunks))
        for chunk, (asked, images) in zip(self.chunks, decoded, strict=True):
            batch = _batch(self.index, asked, images)
            n = len(batch.rows) // len(self._places)
            yield chunk, Batch(batch.images, batch.labels[:n], batch.rows[:n])

    def views(self, images: Tensor) -> list[Tensor]:
        """A batch's images as views of the same ones, (B, 3, S, S) each."""
        crops = list(images.chunk(len(self._places)))
        return [*crops, *(crop.flip(3) for crop in crops)] if self._mirrored else crops

    def pictures(self, rows: IntArray) -> Tensor:
        """The centre crops of at least one row, as they are evaluated: (N, 3, S, S) uint8, on the host."""
        parts = [rows[i : i + self._batch] for i in range(0, len(rows), self._batch)]
        asked = (batch_spec.to_evaluate(self.index, self._cfg, part) for part in parts)
        return torch.cat([images.cpu() for _, images in self._decoder.decode(asked)])

    def avoid(self, known: Mapping[int, str]) -> None:
        """From now on take these rows for broken, for the given reasons, without reading them."""
        self._decoder.avoid(known)

    def close(self) -> None:
        """End its threads."""
        self._decoder.close()

    def request(self, chunk: int) -> BatchSpec:
        """The crops of one chunk."""
        rows = np.arange(chunk * self._batch, min((chunk + 1) * self._batch, len(self.index)))
        return batch_spec.to_evaluate(self.index, self._cfg, rows, self._places)


def _decoder(
    index: Index, cfg: DataConfig, max_batch: int, place: LoaderContext, on_bad: OnBad, warn: Warn
) -> DaliPipeline:
    return DaliPipeline(index, cfg, max_batch, place.num_threads, place.device, on_bad, warn, place.patience_s)


def _batch(index: Index, asked: BatchSpec, images: Tensor) -> Batch:
    labels = torch.from_numpy(index.labels[asked.rows].astype(np.int64))
    return Batch(images, labels.to(images.device, non_blocking=True), asked.rows)
