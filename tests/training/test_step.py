"""The step's arithmetic: the mean over the global batch, however it is split."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import no_bad_image, run_ranks
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from pipeline.config.loading import load
from pipeline.config.schema import Config
from pipeline.data.index import load_index
from pipeline.data.loading.loader import Batch, LoaderContext, TrainLoader
from pipeline.training.optim import make_optimizer
from pipeline.training.schedule import Schedule, lr_at
from pipeline.training.state import TrainState
from pipeline.training.step import train_step

CPU = torch.device("cpu")


class NormFree(nn.Module):
    """A network without BatchNorm, whose loss does not depend on how a batch is split."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 16, 5, 2), nn.ReLU(), nn.Conv2d(16, 32, 5, 2), nn.ReLU(), nn.Flatten(), nn.Linear(800, 10)
        )

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.body(x / 255)
        return logits


def config(*overrides: str) -> Config:
    base = ["data.train=x", "data.val=x", "data.image_size=32", "data.val_resize=32", "train.precision=fp32"]
    return load(None, [*base, "optim.lr=0.05", "optim.warmup_epochs=0", "train.label_smoothing=0.1", *overrides])


def norm_free_state(cfg: Config) -> TrainState:
    torch.manual_seed(0)
    model: Any = NormFree()
    scaler = torch.amp.GradScaler("cpu", enabled=cfg.train.precision == "fp16")
    ema = deepcopy(model) if cfg.train.ema_decay else None
    return TrainState(model, ema, make_optimizer(model, cfg.optim), scaler)


def loss_curve(rank: int, world_size: int, cfg: Config, index: Path, num_steps: int) -> tuple[list[float], Any]:
    """Global losses of the first steps, and the weights after them."""
    state, samples = norm_free_state(cfg), load_index(index)
    schedule = Schedule.create(cfg, len(samples))
    net: nn.Module = state.model
    if world_size > 1:
        net = DistributedDataParallel(net)
    place = LoaderContext(rank, world_size, CPU, 1)
    loader = TrainLoader(samples, cfg.data, place, no_bad_image, global_batch=cfg.train.global_batch, seed=0)
    losses = []
    for batch in loader.from_step(0, num_steps):
        lr = lr_at(state.step, cfg.optim, schedule)
        part = train_step(state, net, batch, cfg.train, lr=lr, world_size=world_size)
        if world_size > 1:
            dist.all_reduce(part)
        losses.append(part.item())
    return losses, {name: value.clone() for name, value in state.model.state_dict().items()}


def loss_curves(
    rank: int, world_size: int, index: Path, num_steps: int, *cfgs: Config
) -> list[tuple[list[float], Any]]:
    return [loss_curve(rank, world_size, cfg, index, num_steps) for cfg in cfgs]


CURVE_STEPS = 25
GLOBAL_BATCHES = [64, 33]


def curve_config(global_batch: int, *overrides: str) -> Config:
    return config(f"train.global_batch={global_batch}", *overrides)


@pytest.fixture(scope="module")
def of_two(digits_index: Callable[[str], Path]) -> dict[int, list[tuple[list[float], Any]]]:
    """By global batch the curves of two ranks, with micro-batches of 7; the processes start once for all."""
    cfgs = [curve_config(global_batch, "train.micro_batch=7") for global_batch in GLOBAL_BATCHES]
    ranks = run_ranks(loss_curves, 2, digits_index("train"), CURVE_STEPS, *cfgs)
    return {size: [rank[i] for rank in ranks] for i, size in enumerate(GLOBAL_BATCHES)}


@pytest.mark.parametrize("global_batch", GLOBAL_BATCHES)
def test_two_workers_have_the_loss_curve_of_one(
    digits_index: Callable[[str], Path], of_two: dict[int, list[tuple[list[float], Any]]], global_batch: int
) -> None:
    """fp32, also with a global batch that two does not divide, and with uneven micro-batches."""
    index = digits_index("train")
    one, weights = loss_curve(0, 1, curve_config(global_batch), index, CURVE_STEPS)
    accumulated, _ = loss_curve(0, 1, curve_config(global_batch, "train.micro_batch=7"), index, CURVE_STEPS)
    (two, two_weights), (other, _) = of_two[global_batch]
    assert two == other
    assert one[-1] < one[0] - 0.1  # it learns, so the curves could differ
    assert two == pytest.approx(one, abs=1e-5)
    assert accumulated == pytest.approx(one, abs=1e-5)
    for name, value in weights.items():
        torch.testing.assert_close(two_weights[name], value, rtol=0, atol=1e-5)


def random_batch(size: int = 12) -> Batch:
    images = torch.randint(0, 256, (size, 3, 32, 32), dtype=torch.uint8)
    return Batch(images, torch.randint(0, 10, (size,)), torch.arange(size).numpy())


@pytest.mark.parametrize(("name", "lr"), [("sgd", 0.01), ("adamw", 0.001)])
def test_a_step_is_a_plain_torch_step(name: str, lr: float) -> None:
    """50 steps with accumulation, clipping and EMA against a loop written out: equal to 1e-6."""
    settings = ["train.global_batch=12", "train.micro_batch=4", "train.clip_norm=1", "train.ema_decay=0.9"]
    cfg = config(f"optim.name={name}", *settings)
    state = norm_free_state(cfg)
    plain, averaged = deepcopy(state.model), deepcopy(state.model)
    groups = [
        {"params": [p for p in plain.parameters() if p.ndim > 1], "weight_decay": 1e-4},
        {"params": [p for p in plain.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer: torch.optim.Optimizer = torch.optim.SGD(groups, lr=lr, momentum=0.9, nesterov=True)
    if name == "adamw":
        optimizer = torch.optim.AdamW(groups, lr=lr)
    for step in range(1, 51):
        batch = random_batch()
        loss = train_step(state, state.model, batch, cfg.train, lr=lr, world_size=1)
        expected = torch.zeros(())
        optimizer.zero_grad()
        for images, labels in zip(batch.images.chunk(3), batch.labels.chunk(3), strict=True):
            part = F.cross_entropy(plain(images), labels, label_smoothing=0.1) / 3
            part.backward()  # type: ignore[no-untyped-call]
            expected += part.detach()
        nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
        decay = min(0.9, (1 + step) / (10 + step))
        for mean, now in zip(averaged.parameters(), plain.parameters(), strict=True):
            mean.data.mul_(decay).add_(now.data, alpha=1 - decay)
        assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    assert state.step == 50
    assert state.ema is not None
    for ours, theirs in [(state.model, plain), (state.ema, averaged)]:
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(mine, other, rtol=0, atol=1e-6)


def test_fp16_skips_an_overflowing_step_and_lowers_its_scale() -> None:
    cfg = config("train.precision=fp16", "train.global_batch=12")
    state = norm_free_state(cfg)
    before = deepcopy(state.model.state_dict())
    train_step(state, state.model, random_batch(), cfg.train, lr=0.1, world_size=1)
    scale = state.scaler.get_scale()
    assert any(not torch.equal(before[k], v) for k, v in state.model.state_dict().items())
    state.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    before = deepcopy(state.model.state_dict())
    train_step(state, state.model, random_batch(), cfg.train, lr=0.1, world_size=1)
    assert state.scaler.get_scale() == 2.0**39
    assert all(torch.equal(before[k], v) for k, v in state.model.state_dict().items())
    assert scale == 2.0**16


def test_a_skipped_first_step_leaves_no_trace() -> None:
    """torch's fused SGD would go on from uninitialised momentum."""
    cfg = config("train.precision=fp16", "train.global_batch=12")
    skipped, plain = norm_free_state(cfg), norm_free_state(cfg)
    junk = [torch.full_like(p, float("nan")) for p in plain.model.parameters()]
    del junk  # what uninitialised memory would likely hold
    first, second = random_batch(), random_batch()
    skipped.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    train_step(skipped, skipped.model, first, cfg.train, lr=0.1, world_size=1)
    skipped.scaler = torch.amp.GradScaler("cpu")
    for state in (skipped, plain):
        train_step(state, state.model, second, cfg.train, lr=0.1, world_size=1)
    for mine, other in zip(skipped.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_bf16_computes_in_bf16_and_keeps_fp32_weights() -> None:
    cfg = config("train.precision=bf16", "train.global_batch=12")
    state = norm_free_state(cfg)
    seen: list[torch.dtype] = []
    model: Any = state.model
    model.body[0].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    train_step(state, state.model, random_batch(), cfg.train, lr=0.1, world_size=1)
    assert seen == [torch.bfloat16]
    assert {p.dtype for p in state.model.parameters()} == {torch.float32}
