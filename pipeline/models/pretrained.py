"""Weights to begin with: torchvision's and timm's files, and our own checkpoints, fitted to the model at hand."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from pipeline.config.loading import load_saved
from pipeline.config.schema import Config
from pipeline.config.training import ModelConfig
from pipeline.errors import UserError
from pipeline.failures import CheckpointError
from pipeline.models.resnet import ResNet
from pipeline.models.state_dict import check_weights, load_weights
from pipeline.runs import checkpoint
from pipeline.storage import Storage

# Where training programs put the weights in what they save, averaged ones first.
WRAPPERS = ("model_ema", "state_dict_ema", "model", "state_dict")
WEIGHT, BIAS = "fc.weight", "fc.bias"  # the last layer
INSIDE = "layer1.0.conv1.weight"  # every depth and variant has it
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # eight bits mean nothing without their scale
COUNTER = "num_batches_tracked"  # of a BatchNorm, which makes no use of it; files from before torch 0.4.1 have none


def load_model(place: Storage, overrides: Sequence[str] = ()) -> tuple[ResNet, Config, tuple[str, ...]]:
    """The network of a checkpoint (averaged weights where it has them), in eval mode on the CPU.

    Args:
        overrides: of its configuration.

    Returns:
        The model, the configuration it was trained with, and its classes in the order of the logits.

    Raises:
        CheckpointError: the checkpoint is damaged. UserError: overrides that make another network.
    """
    source = checkpoint.load(place, use_copy=True)
    cfg, classes = load_saved(source.file(checkpoint.CONFIG), overrides), tuple(source.meta["classes"])
    model = ResNet(cfg.model, len(classes)).to(memory_format=torch.channels_last)
    saved = source.state()
    try:
        load_weights(model, saved["ema"] or saved["model"])
    except ValueError as e:
        raise UserError(f"{place} does not fit this configuration: {e}; leave the model's settings alone") from None
    return model.eval(), cfg, classes


def load_pretrained(model: ResNet, place: str, classes: tuple[str, ...]) -> str:
    """Load weights into a new model; its last layer stays as it is where the classes are others.

    Args:
        place: path or URI of a file, or of one of our checkpoints.
        classes: of the model, in the order of its logits.

    Returns:
        A line for the user on what was loaded.

    Raises:
        UserError: they cannot be read, or are another network's.
    """
    weights, saved_classes = _read(Storage(place))
    num_saved = weights[BIAS].numel()
    same_classes = num_saved == len(classes) and saved_classes in (None, classes)
    if not same_classes:
        weights |= {name: model.state_dict()[name] for name in (WEIGHT, BIAS)}
    model.load_state_dict(_fit_weights(model, weights, place))
    anew = f"the last layer anew: {num_saved} classes there, {len(classes)} here"
    head = "the last layer, too" if same_classes else anew
    return f"begins with the weights of {place}; {head}"


def check_pretrained(cfg: ModelConfig, place: str) -> None:
    """Raise UserError where `load_pretrained` would, before anything is started."""
    weights, _ = _read(Storage(place))
    with torch.device("meta"):
        model = ResNet(cfg, weights[BIAS].numel())
    _fit_weights(model, weights, place)


def _fit_weights(model: ResNet, weights: dict[str, Tensor], place: str) -> dict[str, Tensor]:
    """The weights, with the model's own counters where there are none; UserError where they are not the model's."""
    weights = {name: value for name, value in model.state_dict().items() if name.endswith(COUNTER)} | weights
    try:
        check_weights(model, weights)
    except ValueError as e:
        raise UserError(
            f"model.weights={place}: is another network ({e}); set model.depth and model.variant to its own"
        ) from None
    return weights


def _read(place: Storage) -> tuple[dict[str, Tensor], tuple[str, ...] | None]:
    """The weights by name, and the classes if they are known."""
    if checkpoint.META in place.sizes():
        try:
            source = checkpoint.load(place)
        except CheckpointError as e:
            raise UserError(f"model.weights={place}: {e}") from None
        saved = source.state()
        return dict(saved["ema"] or saved["model"]), tuple(source.meta["classes"])
    file = place.fetch()
    try:
        content = _load(file)
    except Exception as e:  # of a damaged file pickle, zip and safetensors raise whatever they stumble over
        text = str(e) if isinstance(e, ValueError) else type(e).__name__
        raise UserError(
            f"model.weights={place}: is no file of tensors ({text}); fetch it again, or save the state_dict alone"
        ) from None
    inner = next((content[name] for name in WRAPPERS if isinstance(content.get(name), dict)), content)
    tensors = _select_network({str(name): value for name, value in inner.items() if isinstance(value, Tensor)}, place)
    for name, value in tensors.items():
        is_counter = name.endswith(COUNTER) and value.dtype == torch.int64
        kind = value.dtype if value.layout == torch.strided else value.layout
        if kind not in FLOATS and not is_counter:
            raise UserError(
                f"model.weights={place}: {name} is {kind}, not plain floating-point numbers; "
                "give the weights as they were before they were quantized or packed"
            )
        if not value.isfinite().all():
            raise UserError(f"model.weights={place}: {name} is not finite; the file is damaged, fetch it again")
    return tensors, None


def _select_network(tensors: dict[str, Tensor], place: Storage) -> dict[str, Tensor]:
    """The tensors of the one network among them, by its own names.

    What wraps a network puts a prefix before them: DDP "module.", torch.compile "_orig_mod.", Lightning what its module
    calls the network. It is what stands before two names that lie far apart in the network; what is without it is of
    something else, such as a loss, or torchvision's count of averaged models.

    Raises:
        UserError: there is no network, or more than one.
    """
    ends = (BIAS, INSIDE)
    first, second = ({n.removesuffix(end) for n in tensors if f".{n}".endswith(f".{end}")} for end in ends)
    if not first & second:
        lacking = f"{INSIDE} under the prefix of its {BIAS}" if first else BIAS
        raise UserError(f"model.weights={place}: has no {lacking}; give the weights of a ResNet classifier")
    prefix, *others = sorted(first & second)
    if others:
        named = ", ".join(f"{p}{BIAS}" for p in (prefix, *others))
        raise UserError(f"model.weights={place}: holds several networks ({named}); save the state_dict of one alone")
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _load(file: Path) -> dict[str, Any]:
    if file.suffix == ".safetensors":
        return dict(load_file(file))
    loaded = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(loaded, dict):
        raise ValueError(f"it holds a {type(loaded).__name__}")
    return loaded
