"""Weights to begin with: torchvision's and timm's files, and our own checkpoints, fitted to the model at hand."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from pipeline import checkpoint
from pipeline.config import ConfigError, ModelConfig
from pipeline.model import ResNet
from pipeline.state import check_weights
from pipeline.storage import Storage

SUFFIXES = (".pth", ".pt", ".bin", ".safetensors")
# Where training programs put the weights in what they save, averaged ones first.
WRAPPERS = ("model_ema", "state_dict_ema", "model", "state_dict")
WEIGHT, BIAS = "fc.weight", "fc.bias"  # the last layer


def begin_with(model: ResNet, place: str, classes: tuple[str, ...]) -> str:
    """Load weights into a new model; its last layer stays as it is where the classes are others.

    Args:
        place: path or URI of a file, or of one of our checkpoints.
        classes: of the model, in the order of its logits.

    Returns:
        A line for the user on what was loaded.

    Raises:
        ConfigError: they cannot be read, or are another network's.
    """
    weights, theirs = _read(Storage(place))
    number, own = len(weights[BIAS]), model.state_dict()
    kept = number == len(classes) and theirs in (None, classes)
    if not kept:
        weights |= {name: own[name] for name in (WEIGHT, BIAS)}
    _check(model, weights, place)
    model.load_state_dict(weights)
    head = "the last layer, too" if kept else f"the last layer anew: {number} classes there, {len(classes)} here"
    return f"begins with the weights of {place}; {head}"


def check(cfg: ModelConfig, place: str) -> None:
    """Raise ConfigError where `begin_with` would, before anything is started."""
    weights, _ = _read(Storage(place))
    with torch.device("meta"):
        model = ResNet(cfg, len(weights[BIAS]))
    _check(model, weights, place)


def _check(model: ResNet, weights: dict[str, Tensor], place: str) -> None:
    try:
        check_weights(model, weights)
    except ValueError as e:
        raise ConfigError(
            f"model.weights={place}: is another network ({e}); set model.depth and model.variant to its own"
        ) from None


def _read(place: Storage) -> tuple[dict[str, Tensor], tuple[str, ...] | None]:
    """The weights by name, and the classes if they are known."""
    if checkpoint.META in place.sizes():
        try:
            found = checkpoint.read(place)
        except checkpoint.CheckpointError as e:
            raise ConfigError(f"model.weights={place}: {e}") from None
        saved = found.state()
        return dict(saved["ema"] or saved["model"]), tuple(found.meta["classes"])
    file = place.fetch()
    try:
        content = _load(file)
    except Exception as e:  # of a damaged file pickle, zip and safetensors raise whatever they stumble over
        text = str(e) if isinstance(e, ValueError) else type(e).__name__
        raise ConfigError(
            f"model.weights={place}: is no file of tensors ({text}); fetch it again, or save the state_dict alone"
        ) from None
    inner = next((content[name] for name in WRAPPERS if isinstance(content.get(name), dict)), content)
    found_there = {str(name): value for name, value in inner.items() if isinstance(value, Tensor)}
    tensors = {name.removeprefix("module."): value for name, value in found_there.items()}
    tensors.pop("n_averaged", None)  # of torchvision's averaged model
    if tensors.get(BIAS, torch.empty(())).ndim != 1:
        raise ConfigError(f"model.weights={place}: has no {BIAS}; give the weights of a ResNet classifier")
    for name, value in tensors.items():
        if not value.isfinite().all():
            raise ConfigError(f"model.weights={place}: {name} is not finite; the file is damaged, fetch it again")
    return tensors, None


def _load(file: Path) -> dict[str, Any]:
    if file.suffix == ".safetensors":
        return dict(load_file(file))
    loaded = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(loaded, dict):
        raise ValueError(f"it holds a {type(loaded).__name__}")
    return loaded
