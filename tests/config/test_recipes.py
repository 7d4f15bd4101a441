"""Every file of configs/: what its header promises, that it is a configuration, and that it trains a step."""

from pathlib import Path

import numpy as np
import pytest
import torch
from commands import ROOT
from torch import Tensor
from torch.nn import functional as F

from pipeline.cli import app
from pipeline.config.loading import load
from pipeline.config.schema import Config
from pipeline.data.augment_params import drop_path_masks, size_at
from pipeline.data.loading.loader import Batch
from pipeline.models.resnet import drop_rates
from pipeline.training.precision import settle
from pipeline.training.schedule import Schedule, lr_at
from pipeline.training.state import TrainState
from pipeline.training.step import train_step

CONFIGS = ROOT / "configs"
NUM_IMAGES, NUM_CLASSES = 1_281_167, 1000  # of ImageNet-1k

every_recipe = pytest.mark.parametrize(
    "recipe", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: str(path.relative_to(CONFIGS).with_suffix(""))
)
imagenet_recipe = pytest.mark.parametrize(
    "recipe", sorted(CONFIGS.glob("imagenet/*.yaml")), ids=lambda path: str(path.stem)
)


def two_images(cfg: Config) -> Batch:
    """As the loader would deliver them in the first epoch."""
    torch.manual_seed(0)
    size = size_at(0, cfg.data)
    images = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    labels: Tensor = torch.tensor([3, 7])
    if cfg.data.mixes:
        labels = 0.7 * F.one_hot(labels, NUM_CLASSES) + 0.3 * F.one_hot(labels.flip(0), NUM_CLASSES)
    rates = drop_rates(cfg.model)
    kept = drop_path_masks(rates, np.random.default_rng(0).random((2, len(rates)))).astype(np.float32)
    return Batch(images, labels, np.arange(2), torch.from_numpy(kept) if rates else None)


@every_recipe
@pytest.mark.parametrize(
    "overrides",
    [["model.depth=50"], pytest.param([], marks=[pytest.mark.e2e, pytest.mark.thorough])],
    ids=["depth 50", "as it is"],
)
def test_a_recipe_trains(recipe: Path, overrides: list[str]) -> None:
    """Model, loss, optimizer and schedule go together: a step moves the weights, and leaves no number that is none.

    152 layers take minutes for all recipes, so that they are left to the thorough tests; the demo trains them in CI.
    """
    cfg = settle(load(recipe, overrides), torch.device("cpu"))
    state = TrainState.create(cfg, NUM_CLASSES, torch.device("cpu"))
    before = {name: p.detach().clone() for name, p in state.model.named_parameters()}
    lr = lr_at(0, cfg.optim, Schedule.create(cfg, NUM_IMAGES))
    loss = train_step(state, state.model, two_images(cfg), cfg.train, lr=lr, world_size=1)
    assert torch.isfinite(loss)
    assert loss > 0
    assert state.step == 1
    after = dict(state.model.named_parameters())
    assert not torch.equal(after["fc.weight"], before["fc.weight"])
    assert all(torch.isfinite(p).all() for p in after.values())


@every_recipe
def test_the_schedule_comes_down(recipe: Path) -> None:
    """A warm-up or steps beyond the end would leave the learning rate up."""
    cfg = load(recipe)
    schedule = Schedule.create(cfg, NUM_IMAGES)
    rates = [lr_at(step, cfg.optim, schedule) for step in range(0, schedule.num_steps, schedule.steps_per_epoch // 2)]
    assert lr_at(schedule.num_steps - 1, cfg.optim, schedule) < 0.01 * max(rates)


@imagenet_recipe
def test_a_recipe_says_how_the_learning_rate_follows_another_batch(recipe: Path) -> None:
    optim, train = load(recipe).optim, load(recipe).train
    assert optim.lr_scaling == {"sgd": "linear", "lamb": "sqrt"}[optim.name]
    assert optim.lr_batch == pytest.approx(train.global_batch, rel=1e-3)  # the published rate is used as it stands


@every_recipe
def test_the_header_has_command_source_and_expected_accuracy(recipe: Path) -> None:
    text = recipe.read_text()
    header = text[: text.index("\n\n")]
    assert all(line.startswith("#") for line in header.splitlines())
    assert f"#   pipeline train {recipe.relative_to(ROOT)}" in header
    assert "\n# Source: " in header
    expected = header[header.index("\n# Expected: ") :]
    assert any(character.isdigit() for character in expected)
    if recipe.parent.name == "imagenet":
        assert "Not yet run by us." in " ".join(expected.replace("#", "").split())


@every_recipe
def test_a_recipe_prints(recipe: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert app.main(["config", str(recipe)]) == 0
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    assert load(printed) == load(recipe)
