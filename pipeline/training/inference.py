"""Using a trained checkpoint: exact evaluation, and predictions for image files. One process, no Ray."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.config.schema import Config
from pipeline.data.index import Index
from pipeline.data.indexing.build import index_files, open_index
from pipeline.data.indexing.rows import printable
from pipeline.data.loading.loader import EvalLoader, LoaderContext, Views
from pipeline.errors import UserError
from pipeline.failures import NonFiniteError
from pipeline.models import pretrained
from pipeline.storage import Storage
from pipeline.tracking.metrics import Predictions
from pipeline.training.backends import kernels_by_shape, set_backends
from pipeline.training.crashing_images import known_crashing_images
from pipeline.training.evaluation import evaluate, log_probabilities
from pipeline.training.microbatch import OomSplitter
from pipeline.training.precision import emulation, hardware_of, settle

CHUNK = 4096  # images that are indexed together: of millions, the first answers come soon


def evaluate_checkpoint(
    place: Storage,
    data: str | None,
    warn: Callable[[str], None],
    *,
    views: Views = "one",
    overrides: Sequence[str] = (),
    fix: str = "",
) -> tuple[Predictions, Index]:
    """What a checkpoint says of images, exactly.

    Args:
        data: a source or an index; None: its run's validation images.
        warn: told what is left out, where memory is short, and where its precision is emulated here.
        views: of each image, see `EvalLoader`.
        overrides: of its configuration, such as `data.val_size=288`.
        fix: of an emulated precision, where it is not an override.

    Raises:
        UserError: data that cannot be evaluated on, or a broken image in it.
    """
    here = LoaderContext.here()
    torch.set_num_threads(here.num_threads)
    model, cfg, classes = pretrained.load_model(place, overrides)
    cfg = settle(cfg, here.device)
    set_backends(cfg.train, here.device)
    if text := emulation(cfg.train.precision, [hardware_of(here.device)], fix):
        warn(f"warning: {text}")
    found, report = open_index(data or cfg.data.val)
    report.tell_refused(lambda text: warn(f"warning: {text}"))
    index = found.with_classes(classes)
    with closing(EvalLoader(index, cfg.data, here, _refuse, batch=cfg.train.eval_batch, views=views)) as loader:
        loader.avoid(known_crashing_images(place.parent.parent, index))
        try:
            predictions = evaluate(
                model.to(here.device),
                loader,
                precision=cfg.train.precision,
                device=here.device,
                in_parts=OomSplitter(warn),
            )
        except NonFiniteError as e:
            raise UserError(f"{place}: {e}; name an earlier checkpoint") from None
    return predictions, index


def some_images(cfg: Config, number: int) -> tuple[Tensor, str]:
    """Up to `number` images to try a model on, spread over the run's validation images; random ones in their stead.

    Returns:
        (N, 3, S, S) uint8 on the CPU, and what they are, in words.
    """
    try:
        index = open_index(cfg.data.val)[0]
        chosen = np.unique(np.linspace(0, len(index) - 1, number).astype(int))
        with closing(EvalLoader(index, cfg.data, LoaderContext.here(), _refuse, batch=number)) as loader:
            return loader.pictures(chosen), "validation images"
    except (UserError, OSError) as e:
        shape = (number, 3, cfg.data.size_to_evaluate, cfg.data.size_to_evaluate)
        images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        return images, f"random images (of the run's own: {e})"


def predict(place: Storage, images: Sequence[Path], top: int, warn: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """The `top` likeliest classes of each image, in the order given, while the images are read.

    Computed in the checkpoint's precision where this machine has it in hardware, else in fp32: an answer counts here,
    not figures that are to be compared with the training's.

    Args:
        warn: told where memory is short.

    Yields:
        For each image {"image", "class", "probability", "top": [{"class", "probability"}, ...]}, or
        {"image", "error"} where it cannot be decoded.

    Raises:
        UserError: `top` is not a number of the model's classes.
    """
    here = LoaderContext.here()
    torch.set_num_threads(here.num_threads)
    model, cfg, classes = pretrained.load_model(place)
    if not 1 <= top <= len(classes):
        raise UserError(f"--top {top}: must be from 1 to the model's {len(classes)} classes")
    # Others' images: broken ones are told one by one, however many they are.
    cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, max_bad_fraction=1.0))
    set_backends(cfg.train, here.device)
    model, in_parts = model.to(here.device), OomSplitter(warn)
    precision = cfg.train.precision if cfg.train.precision in hardware_of(here.device).native else "fp32"

    def probabilities(pixels: Tensor) -> Tensor:
        return log_probabilities(model, [pixels], precision, in_parts).exp()

    for start in range(0, len(images), CHUNK):
        chunk = images[start : start + CHUNK]
        index, refused = index_files(chunk)
        results: dict[str, dict[str, Any]] = {one.path: {"image": one.path, "error": one.reason} for one in refused}
        if index is not None:
            results |= _predict(probabilities, cfg, classes, index, here, top)
        yield from (results[printable(str(image))] for image in chunk)


@torch.inference_mode()
@kernels_by_shape()
def _predict(
    probabilities: Callable[[Tensor], Tensor],
    cfg: Config,
    classes: tuple[str, ...],
    index: Index,
    here: LoaderContext,
    top: int,
) -> dict[str, dict[str, Any]]:
    broken: dict[str, str] = {}
    results: dict[str, dict[str, Any]] = {}
    with closing(EvalLoader(index, cfg.data, here, broken.__setitem__, batch=cfg.train.eval_batch)) as loader:
        for _, batch in loader:
            best = probabilities(batch.images).topk(top)
            for row, likely, labels in zip(batch.rows, best.values.tolist(), best.indices.tolist(), strict=True):
                likeliest = [{"class": classes[k], "probability": p} for k, p in zip(labels, likely, strict=True)]
                image = index.path(int(row))
                results[image] = {"image": image, **likeliest[0], "top": likeliest}
    return results | {path: {"image": path, "error": reason} for path, reason in broken.items()}


def _refuse(path: str, reason: str) -> None:
    raise UserError(
        f"{path} is broken ({reason}); fix it, or have what is broken or missing left out by a new index: --data FOLDER"
    )
