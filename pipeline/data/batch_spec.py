"""What a batch consists of, before anything is read: rows, crops and draws, a pure function of seed and step."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.config.data import DataConfig
from pipeline.data import augment_params
from pipeline.data.index import Index
from pipeline.data.stream import BoolArray, DeterministicSampler, FloatArray, IntArray, Purpose, uniforms


@dataclass(frozen=True)
class BatchSpec:
    """Images to decode together.

    rows: (B,). labels: (B,), of the rows. size: height and width of the output, pixels. anchors, shapes: (B, 2) as
    (y, x) pixels of the image, what is cut out. flips: (B,). draws: (B, ...) arrays for `augment`, by name. mixture:
    (B / 2,) weights and (B / 2, 4) boxes for `mix`, or None. drop_path_mask: (B, blocks) factors of the network's
    residual branches, float32, or None.
    """

    rows: IntArray
    labels: IntArray
    size: int
    anchors: IntArray
    shapes: IntArray
    flips: BoolArray
    draws: dict[str, NDArray[Any]] = field(default_factory=dict)
    mixture: tuple[IntArray, IntArray] | None = None
    drop_path_mask: NDArray[np.float32] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def part(self, start: int, stop: int) -> "BatchSpec":
        """Images [start, stop)."""
        s, pairs = slice(start, stop), slice(start // 2, stop // 2)
        return BatchSpec(
            rows=self.rows[s],
            labels=self.labels[s],
            size=self.size,
            anchors=self.anchors[s],
            shapes=self.shapes[s],
            flips=self.flips[s],
            draws={name: values[s] for name, values in self.draws.items()},
            mixture=None if self.mixture is None else (self.mixture[0][pairs], self.mixture[1][pairs]),
            drop_path_mask=None if self.drop_path_mask is None else self.drop_path_mask[s],
        )


@dataclass(frozen=True)
class Joined:
    """What several requests are for, one behind the other, to be decoded together. They must be of one size."""

    make_spec: Callable[[Index, Any], BatchSpec]

    def __call__(self, index: Index, requests: Sequence[Any]) -> BatchSpec:
        specs = [self.make_spec(index, request) for request in requests]
        return BatchSpec(*(_join([getattr(spec, f.name) for spec in specs]) for f in fields(BatchSpec)))


def _join(values: Sequence[Any]) -> Any:
    match values[0]:
        case np.ndarray():
            return np.concatenate(values)
        case tuple():
            return tuple(map(_join, zip(*values, strict=True)))
        case dict():
            return {name: _join([value[name] for value in values]) for name in values[0]}
        case same:
            return same


def make_sampler(cfg: DataConfig, num_samples: int, global_batch: int, seed: int) -> DeterministicSampler:
    """The order that a configuration gives to a data set of `num_samples` images."""
    unit = 2 if cfg.mixes else 1  # the two images of a pair are mixed on one rank
    return DeterministicSampler(
        num_samples, global_batch, seed, cfg.shuffle_block, cfg.shuffle_window, cfg.repeated_aug, unit
    )


def draw_names(cfg: DataConfig) -> list[str]:
    """The names of the draws that `augment` gets in training."""
    wanted = {"jitter": any(cfg.jitter), "ops": cfg.auto_augment != "none", "erase": cfg.erase > 0}
    return [name for name, is_wanted in wanted.items() if is_wanted]


@dataclass(frozen=True)
class TrainSpecs:
    """What a rank trains on in a step.

    drop_rates: of the network's residual blocks (stochastic depth); none where there is none.
    """

    cfg: DataConfig
    sampler: DeterministicSampler
    rank: int
    world_size: int
    drop_rates: tuple[float, ...] = ()

    def __call__(self, index: Index, step: int) -> BatchSpec:
        cfg, seed = self.cfg, self.sampler.seed
        epoch, start, stop = self.sampler.positions(step, self.rank, self.world_size)
        rows, size = self.sampler.rows(epoch, start, stop), augment_params.size_at(epoch, cfg)

        def draw(purpose: Purpose, number: int) -> FloatArray:
            return uniforms(purpose, seed, epoch, start, stop, number)

        sizes = index.image_sizes(rows)
        if cfg.crop_short is not None:
            anchors, shapes = augment_params.short_side_crops(sizes, size, cfg.crop_short, draw(Purpose.CROP, 3))
        else:
            crop = draw(Purpose.CROP, augment_params.CROP_DRAWS)
            anchors, shapes = augment_params.random_resized_crops(sizes, cfg.crop_scale, cfg.crop_ratio, crop)
        flips = augment_params.flips(cfg.flip, draw(Purpose.FLIP, 1))
        names, draws = draw_names(cfg), dict[str, NDArray[Any]]()
        if "jitter" in names:
            draws["jitter"] = augment_params.jitters(cfg.jitter, draw(Purpose.JITTER, 4)).astype(np.float32)
        if "ops" in names:
            operations = augment_params.operations(cfg, draw(Purpose.AUGMENT, augment_params.num_policy_draws(cfg)))
            draws["ops"] = operations.astype(np.int32)
        if "erase" in names:
            erase = draw(Purpose.ERASE, 1 + augment_params.ERASE_DRAWS)
            boxes = augment_params.erasures(cfg.erase, cfg.erase_scale, cfg.erase_ratio, size, erase)
            draws["erase"] = np.concatenate(boxes, axis=1).astype(np.float32)
        spec = BatchSpec(rows, index.labels_of(rows), size, anchors, shapes, flips, draws)
        if cfg.mixes:
            mixing = uniforms(Purpose.MIX, seed, epoch, start // 2, stop // 2, 4)
            spec = replace(spec, mixture=augment_params.mixtures(cfg.mixup, cfg.cutmix, size, mixing))
        if self.drop_rates:
            dropping = draw(Purpose.DROP_PATH, len(self.drop_rates))
            spec = replace(spec, drop_path_mask=augment_params.drop_path_masks(self.drop_rates, dropping))
        return spec


@dataclass(frozen=True)
class EvalSpecs:
    """Crops of some rows at each of the places: all rows at the first one, all at the next one, and so on."""

    cfg: DataConfig
    places: Sequence[tuple[float, float]] = (augment_params.CENTRE,)

    def __call__(self, index: Index, rows: IntArray) -> BatchSpec:
        size = self.cfg.size_to_evaluate
        sizes = index.image_sizes(rows)
        crops = [augment_params.crops_at(sizes, size / self.cfg.val_resize, place) for place in self.places]
        anchors, shapes = (np.concatenate(parts) for parts in zip(*crops, strict=True))
        rows = np.tile(rows, len(self.places))
        flips = np.zeros(len(rows), dtype=np.bool_)
        return BatchSpec(rows, index.labels_of(rows), size, anchors, shapes, flips)


class WholeImageSpecs(EvalSpecs):
    """All of each image."""

    def __call__(self, index: Index, rows: IntArray) -> BatchSpec:
        shapes = index.image_sizes(rows)
        return replace(super().__call__(index, rows), anchors=np.zeros_like(shapes), shapes=shapes)
