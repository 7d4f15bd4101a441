"""Learning rate and parameter groups."""

import math
from itertools import pairwise

import pytest
import torch

from pipeline.config.loading import load
from pipeline.config.schema import Config
from pipeline.config.training import ModelConfig, OptimConfig
from pipeline.models.resnet import ResNet
from pipeline.training.optim import make_optimizer
from pipeline.training.schedule import Schedule, lr_at, lr_note

TEN_BY_100 = Schedule(steps_per_epoch=100, num_steps=1000)


def test_warm_up_rises_linearly_to_the_top() -> None:
    cfg = OptimConfig(lr=0.5, warmup_epochs=2.0)
    rates = [lr_at(step, cfg, TEN_BY_100) for step in range(201)]
    assert rates[0] == pytest.approx(0.5 / 200)
    assert rates[199] == rates[200] == pytest.approx(0.5)
    assert all(b - a == pytest.approx(0.5 / 200) for a, b in pairwise(rates[:200]))


def test_cosine_is_its_formula() -> None:
    cfg = OptimConfig(lr=0.5, warmup_epochs=2.0, final_lr=0.1)
    for step in (200, 321, 600, 999):
        expected = 0.1 + 0.5 * (0.5 - 0.1) * (1 + math.cos(math.pi * (step - 200) / 800))
        assert lr_at(step, cfg, TEN_BY_100) == pytest.approx(expected)


def test_cosine_and_torchs_scheduler_agree() -> None:
    cfg = OptimConfig(lr=0.5, warmup_epochs=0)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=1000)
    for step in range(1000):
        assert lr_at(step, cfg, TEN_BY_100) == pytest.approx(scheduler.get_last_lr()[0], abs=1e-9)
        optimizer.step()
        scheduler.step()


def test_linear_falls_evenly() -> None:
    cfg = OptimConfig(lr=0.4, schedule="linear", warmup_epochs=0)
    assert [lr_at(step, cfg, TEN_BY_100) for step in (0, 250, 500)] == pytest.approx([0.4, 0.3, 0.2])


def test_step_schedule_of_the_paper() -> None:
    cfg = OptimConfig(lr=0.1, schedule="step", warmup_epochs=0, step_epochs=(3.0, 6.0), step_gamma=0.1)
    rates = [lr_at(step, cfg, TEN_BY_100) for step in (0, 299, 300, 599, 600, 999)]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])


def test_weight_decay_spares_norms_and_biases() -> None:
    model = ResNet(ModelConfig(depth=50), num_classes=10)
    decayed, spared = make_optimizer(model, OptimConfig(weight_decay=1e-4)).param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    assert (decayed["weight_decay"], spared["weight_decay"]) == (1e-4, 0.0)
    assert all(p.ndim > 1 for p in decayed["params"])
    assert {names[id(p)] for p in spared["params"]} >= {"bn1.weight", "layer1.0.downsample.1.weight", "fc.bias"}
    assert len(decayed["params"]) + len(spared["params"]) == len(names)


def test_length_in_steps_or_epochs() -> None:
    data = ["data.train=a", "data.val=b", "train.global_batch=64"]
    assert Schedule.create(load(None, [*data, "train.epochs=7"]), 1437) == Schedule(22, 154)
    assert Schedule.create(load(None, [*data, "train.epochs=7", "train.steps=30"]), 1437) == Schedule(22, 30)


def recipe(*overrides: str) -> Config:
    return load(None, ["data.train=a", "data.val=b", "optim.lr=0.4", "optim.lr_batch=1024", *overrides])


@pytest.mark.parametrize(("scaling", "lr"), [("none", 0.4), ("linear", 0.1), ("sqrt", 0.2)])
def test_the_learning_rate_follows_the_global_batch_as_stated(scaling: str, lr: float) -> None:
    settings = [f"optim.lr_scaling={scaling}", "optim.warmup_epochs=0", "optim.final_lr=0.04"]
    cfg = recipe("train.global_batch=256", *settings)
    schedule = Schedule.create(cfg, 256_000)
    assert lr_at(0, cfg.optim, schedule) == pytest.approx(lr)
    assert lr_at(schedule.num_steps, cfg.optim, schedule) == pytest.approx(lr / 10)
    note = lr_note(cfg)
    assert note is not None
    assert "is for a global batch of 1024; with 256 images it is" in note
    assert f"it is {lr:g} (optim.lr_scaling={scaling})" in note
    assert lr_note(recipe("train.global_batch=1024", *settings)) is None


def test_each_part_has_its_learning_rate() -> None:
    model = ResNet(ModelConfig(depth=18, freeze="stem"), 10)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = make_optimizer(model, OptimConfig(layer_decay=0.5)).param_groups
    scales = {names[id(p)].partition(".")[0]: group["lr_scale"] for group in groups for p in group["params"]}
    assert scales == {"layer1": 1 / 16, "layer2": 1 / 8, "layer3": 1 / 4, "layer4": 1 / 2, "fc": 1.0}
    assert {group["weight_decay"] for group in groups if group["params"][0].ndim <= 1} == {0.0}


def test_lamb_and_lars_take_the_steps_of_their_papers() -> None:
    """First step, bias-corrected: LAMB (You et al. 2020, algorithm 2) and LARS (You et al. 2017, algorithm 1)."""
    lr, decay = 0.1, 0.01
    for name in ("lamb", "lars"):
        torch.manual_seed(0)
        layer = torch.nn.Linear(5, 3, bias=False)
        weight, gradient = layer.weight.detach().clone(), torch.randn(3, 5) / 10  # of a norm below LAMB's limit of 1
        cfg = OptimConfig(name=name, lr=lr, weight_decay=decay, momentum=0.9, nesterov=False)
        optimizer = make_optimizer(layer, cfg)
        layer.weight.grad = gradient.clone()
        optimizer.step()
        if name == "lamb":
            update = gradient / (gradient.abs() + 1e-6) + decay * weight
            expected = weight - lr * weight.norm() / update.norm() * update
        else:
            trust = 0.001 * weight.norm() / (gradient.norm() + decay * weight.norm())
            expected = weight - lr * trust * (gradient + decay * weight)
        torch.testing.assert_close(layer.weight.detach(), expected, rtol=0, atol=1e-6)
