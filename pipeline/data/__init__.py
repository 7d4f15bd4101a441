"""Batches for training and evaluation: the exact stream of `sampling`, decoded by `dali`."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.config import DataConfig
from pipeline.data import sampling
from pipeline.data.dali import Decoder, Request
from pipeline.data.index import Index
from pipeline.data.sampling import IntArray, Purpose


@dataclass(frozen=True)
class Batch:
    """A rank's part of a global batch.

    images: (B, 3, S, S) uint8, channels_last; labels: (B,) int64; both on the device.
    rows: (B,) rows of the index, on the host.
    """

    images: Tensor
    labels: Tensor
    rows: IntArray


@dataclass(frozen=True)
class Place:
    """Where a loader works: the rank among how many, the device, the threads for decoding."""

    rank: int
    world_size: int
    device: torch.device
    num_threads: int


OnBad = Callable[[str, str], None]  # called with a broken image's path and the reason


class TrainLoader:
    """The training stream of one rank."""

    def __init__(self, index: Index, cfg: DataConfig, place: Place, on_bad: OnBad, *, global_batch: int, seed: int):
        self._index, self._cfg, self._place = index, cfg, place
        self._global_batch, self._seed = global_batch, seed
        max_batch = -(-global_batch // place.world_size)
        self._decoder = Decoder(index, cfg, max_batch, place.num_threads, place.device, on_bad)

    def from_step(self, step: int, stop: int) -> Iterator[Batch]:
        """This rank's part of global batches [step, stop)."""
        requests = (self.request(s) for s in range(step, stop))
        for request, images in self._decoder.decode(requests):
            yield _batch(self._index, request, images)

    def request(self, step: int) -> Request:
        """What this rank trains on in `step`: a pure function of seed, step and index."""
        epoch, start, stop = sampling.batch_positions(
            step, len(self._index), self._global_batch, self._place.rank, self._place.world_size
        )
        rows = sampling.permute(np.arange(start, stop), len(self._index), self._seed, epoch)
        crop = sampling.uniforms(Purpose.CROP, self._seed, epoch, start, stop, 2 * sampling.CROP_TRIES + 2)
        anchors, shapes = sampling.random_resized_crops(
            self._index.heights[rows].astype(np.int64),
            self._index.widths[rows].astype(np.int64),
            self._cfg.crop_scale,
            self._cfg.crop_ratio,
            crop,
        )
        flip = sampling.uniforms(Purpose.FLIP, self._seed, epoch, start, stop, 1)
        return Request(rows, anchors, shapes, sampling.flips(self._cfg.flip, flip))


class EvalLoader:
    """Evaluation in chunks that are the same for every world size, so that figures are too.

    Chunk j holds rows [j * batch, (j + 1) * batch); rank r takes chunks r, r + W, r + 2W, ...
    """

    def __init__(self, index: Index, cfg: DataConfig, place: Place, on_bad: OnBad, *, batch: int):
        self.index, self._cfg, self._batch = index, cfg, batch
        self.num_chunks = -(-len(index) // batch)
        self.chunks = range(place.rank, self.num_chunks, place.world_size)
        self._decoder = Decoder(index, cfg, batch, place.num_threads, place.device, on_bad)

    def __iter__(self) -> Iterator[tuple[int, Batch]]:
        """(chunk, batch) for this rank's chunks."""
        decoded = self._decoder.decode(map(self.request, self.chunks))
        for chunk, (request, images) in zip(self.chunks, decoded, strict=True):
            yield chunk, _batch(self.index, request, images)

    def request(self, chunk: int) -> Request:
        """The centre crops of one chunk."""
        rows = np.arange(chunk * self._batch, min((chunk + 1) * self._batch, len(self.index)))
        anchors, shapes = sampling.centre_crops(
            self.index.heights[rows].astype(np.int64),
            self.index.widths[rows].astype(np.int64),
            self._cfg.image_size / self._cfg.val_resize,
        )
        return Request(rows, anchors, shapes, np.zeros(len(rows), dtype=np.bool_))


def _batch(index: Index, request: Request, images: Tensor) -> Batch:
    labels = torch.from_numpy(index.labels[request.rows].astype(np.int64))
    return Batch(images, labels.to(images.device, non_blocking=True), request.rows)
