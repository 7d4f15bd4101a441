"""Using a trained checkpoint: exact evaluation, and predictions for image files. One process, no Ray."""

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from pipeline import checkpoint
from pipeline.config import Config, ConfigError
from pipeline.data.build import index_files, open_index
from pipeline.data.index import Index
from pipeline.data.loader import EvalLoader, Place, Views
from pipeline.evaluate import evaluate
from pipeline.predictions import Predictions
from pipeline.step import autocast
from pipeline.storage import Storage


def evaluate_checkpoint(
    place: Storage, data: str | None = None, *, views: Views = "one", overrides: Sequence[str] = ()
) -> tuple[Predictions, Index]:
    """What a checkpoint says of the images in `data`, a source or an index; by default of its run's validation images.

    Args:
        views: of each image, see `EvalLoader`.
        overrides: of its configuration, such as `data.val_size=288`.

    Raises:
        ConfigError: data that cannot be evaluated on, or a broken image in it.
    """
    here = Place.here()
    torch.set_num_threads(here.num_threads)
    model, cfg, classes = checkpoint.load_model(place, overrides)
    index = open_index(data or cfg.data.val)[0].with_classes(classes)
    with closing(EvalLoader(index, cfg.data, here, _refuse, batch=cfg.train.eval_batch, views=views)) as loader:
        said = evaluate(model.to(here.device), loader, precision=cfg.train.precision, device=here.device)
    return said, index


def predict(place: Storage, images: list[Path], top: int) -> list[dict[str, Any]]:
    """The `top` likeliest classes of each image, in the order given.

    Returns:
        For each image {"image", "class", "probability", "top": [{"class", "probability"}, ...]}, or
        {"image", "error"} where it cannot be decoded.
    """
    here = Place.here()
    torch.set_num_threads(here.num_threads)
    model, cfg, classes = checkpoint.load_model(place)
    if not 1 <= top <= len(classes):
        raise ConfigError(f"--top {top}: must be from 1 to the model's {len(classes)} classes")
    index, refused = index_files(images)
    results: dict[str, dict[str, Any]] = {one.path: {"image": one.path, "error": one.reason} for one in refused}
    if index is not None:
        results |= _predict(model.to(here.device), cfg, classes, index, here, top)
    return [results[str(image)] for image in images]


@torch.inference_mode()
def _predict(
    model: torch.nn.Module, cfg: Config, classes: tuple[str, ...], index: Index, here: Place, top: int
) -> dict[str, dict[str, Any]]:
    broken: dict[str, str] = {}
    results: dict[str, dict[str, Any]] = {}
    with closing(EvalLoader(index, cfg.data, here, broken.__setitem__, batch=cfg.train.eval_batch)) as loader:
        for _, batch in loader:
            with autocast(cfg.train.precision, here.device):
                logits = model(batch.images)
            best = logits.float().softmax(1).topk(top)
            for row, probabilities, labels in zip(batch.rows, best.values.tolist(), best.indices.tolist(), strict=True):
                likeliest = [
                    {"class": classes[k], "probability": p} for k, p in zip(labels, probabilities, strict=True)
                ]
                image = index.path(int(row))
                results[image] = {"image": image, **likeliest[0], "top": likeliest}
    return results | {path: {"image": path, "error": reason} for path, reason in broken.items()}


def _refuse(path: str, reason: str) -> None:
    raise ConfigError(f"{path} cannot be decoded ({reason}); mend or remove it")
