"""A GPU whose memory is short: smaller micro-batches, the same step. The shortage is pretended, the error torch's."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.config import Config, ConfigError
from pipeline.data.loader import Batch
from pipeline.memory import MicroBatches
from pipeline.settings import load
from pipeline.state import TrainState
from pipeline.step import train_step


class Short(nn.Module):
    """A network for which there is memory for `room` images only; it breaks when part of the work is done."""

    def __init__(self, model: nn.Module, room: int):
        super().__init__()
        self.model, self.room, self.sizes = model, room, list[int]()

    def forward(self, images: Tensor) -> Tensor:
        self.sizes.append(len(images))
        out: Tensor = self.model(images)  # which moves the BatchNorms' statistics
        if len(images) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory (pretended)")
        return out


def config(*overrides: str) -> Config:
    data = ["data.train=x", "data.val=x", "data.image_size=32", "data.val_resize=32"]
    return load(None, [*data, "model.depth=18", "train.precision=fp32", "train.global_batch=12", *overrides])


def batch(seed: int, size: int, side: int = 32) -> Batch:
    torch.manual_seed(seed)
    images = torch.randint(0, 256, (size, 3, side, side), dtype=torch.uint8)
    return Batch(images, torch.randint(0, 10, (size,)), torch.arange(size).numpy())


def stepped(cfg: Config, room: int | None, said: list[str]) -> tuple[dict[str, Tensor], list[int]]:
    """The weights after three steps."""
    state = TrainState.create(cfg, 10, torch.device("cpu"))
    net = Short(state.model, 99 if room is None else room)
    micro_batches = MicroBatches(cfg.train, room is not None, said.append)
    for seed in range(3):
        size = micro_batches.size(state, net, batch(seed, 12))
        train_step(state, net, batch(seed, 12), cfg.train, lr=0.05, world_size=1, micro_batch=size)
    return state.model.state_dict(), net.sizes


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_micro_batch_is_halved_until_it_fits_and_the_step_is_the_same(optimizer: str) -> None:
    said: list[str] = []
    short, sizes = stepped(config(f"optim.name={optimizer}"), 4, said)
    assert sizes == [12, 6, 3, 3, *[3] * 4 * 3]  # tried out once, two of those that fit, then three steps
    assert ["6 instead of 12" in said[0], "3 instead of 6" in said[1], len(said)] == [True, True, 2]
    assert "the global batch stays" in said[0]
    asked, _ = stepped(config(f"optim.name={optimizer}", "train.micro_batch=3"), None, said)
    for name, value in asked.items():
        assert torch.equal(short[name], value), name


def test_where_memory_suffices_nothing_is_said_or_changed() -> None:
    said: list[str] = []
    roomy, _ = stepped(config(), 12, said)
    plain, _ = stepped(config(), None, said)
    assert not said
    assert all(torch.equal(roomy[name], value) for name, value in plain.items())


def test_a_single_image_that_does_not_fit_gets_one_line() -> None:
    state = TrainState.create(config(), 10, torch.device("cpu"))
    micro_batches = MicroBatches(config().train, True, lambda text: None)
    with pytest.raises(ConfigError, match=r"data.image_size=64: a single image does not fit .* model.recompute=true"):
        micro_batches.size(state, Short(state.model, 0), batch(0, 2, 64))


def rank_step(rank: int, world_size: int, room: int) -> Any:
    """One step of two ranks, of which the second one's memory is short."""
    cfg = config()
    state = TrainState.create(cfg, 10, torch.device("cpu"))
    inner = Short(state.model, room if rank == 1 else 99)
    net = DistributedDataParallel(inner, forward_sync_buffers=False)  # which would be one more exchange a forward
    said: list[str] = []
    micro_batches = MicroBatches(cfg.train, True, said.append)
    before = deepcopy(dict(state.model.named_buffers()))
    share = batch(rank, 6)
    size = micro_batches.size(state, net, share)
    untouched = all(torch.equal(before[name], buffer) for name, buffer in state.model.named_buffers())
    train_step(state, net, share, cfg.train, lr=0.05, world_size=world_size, micro_batch=size)
    return size, len(said), untouched, state.model.fc.weight.detach().clone()


def test_a_rank_that_is_short_of_memory_does_not_hold_up_the_others() -> None:
    first, second = run_ranks(rank_step, 2, 3)
    assert first[:3] == (6, 0, True)
    assert second[:3] == (3, 1, True)
    assert torch.equal(first[3], second[3])
