"""Nothing in a step waits for the device: each wait leaves it without work until the next kernel is launched."""

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.config.loading import load
from pipeline.config.schema import Config
from pipeline.data.augment_params import MIX_ONE
from pipeline.data.loading.loader import Batch
from pipeline.data.loading.mix import mix
from pipeline.training.state import TrainState
from pipeline.training.step import train_step

WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "unique", "masked_select")
SIZE, CLASSES = 32, 10


class NoWaits(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses what a GPU would be waited for by: values that the host reads, sizes that depend on values."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in WAITS, f"{name} waits for the device"
        return func(*args, **(kwargs or {}))


def no_waits() -> NoWaits:
    return NoWaits()  # type: ignore[no-untyped-call]


def config(optimizer: str) -> Config:
    settings = ["model.depth=18", "train.global_batch=8", "train.precision=fp32", "train.ema_decay=0.9"]
    settings += [
        "train.clip_norm=1",
        "data.mixup=0.2",
        "data.cutmix=1.0",
        "model.drop_path=0.1",
        f"optim.name={optimizer}",
    ]
    return load(None, ["data.train=x", "data.val=x", *settings])


def batch(device: str) -> Batch:
    images = torch.zeros(8, 3, SIZE, SIZE, dtype=torch.uint8, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.arange(8, device=device) % CLASSES
    boxes = np.tile([0, 0, 5, 5], (4, 1))
    images, shares = mix(images, labels, np.full(4, MIX_ONE // 2), boxes, CLASSES)
    return Batch(images, shares, np.arange(8), torch.ones(8, 8, device=device))


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_step_waits_for_nothing(name: str) -> None:
    cfg = config(name)
    state = TrainState.create(cfg, CLASSES, torch.device("cpu"))
    train_step(state, state.model, batch("cpu"), cfg.train, lr=0.1, world_size=1)  # some look once at what is there
    trained_on = batch("cpu")  # on a CPU one_hot looks at its labels
    with no_waits():
        train_step(state, state.model, trained_on, cfg.train, lr=0.1, world_size=1, micro_batch=4)
    assert state.step == 2


def test_mixing_needs_no_values() -> None:
    """On tensors that have none."""
    with no_waits():
        mixed = batch("meta")
    assert mixed.images.shape == (8, 3, SIZE, SIZE)
    assert mixed.labels.shape == (8, CLASSES)


def test_the_test_can_fail() -> None:
    with no_waits(), pytest.raises(AssertionError, match="_local_scalar_dense waits for the device"):
        torch.ones(1).item()
