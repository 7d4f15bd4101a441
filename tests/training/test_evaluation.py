"""Exact evaluation: every sample once, the same figures to the last bit for every world size."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import no_bad_image, run_ranks
from torch.nn import functional as F

from pipeline.config.data import DataConfig
from pipeline.config.training import ModelConfig
from pipeline.data.index import load_index
from pipeline.data.indexing.build import build_index
from pipeline.data.loading.loader import EvalLoader, LoaderContext
from pipeline.failures import NonFiniteError
from pipeline.models.resnet import ResNet
from pipeline.training.evaluation import evaluate, sync_buffers
from pipeline.training.microbatch import OomSplitter

CPU = torch.device("cpu")
SMALL = DataConfig(train="-", val="-", image_size=32, val_resize=32)


@pytest.fixture(scope="module")
def index_of_359(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The validation images less one: a prime number of samples."""
    folder = tmp_path_factory.mktemp("359")
    for file in sorted((digits / "val").glob("*/*.jpg"))[:-1]:
        (folder / file.parent.name).mkdir(exist_ok=True)
        (folder / file.parent.name / file.name).symlink_to(file)
    build_index(folder)[0].save(folder / "index.arrow")
    return folder / "index.arrow"


def scores(rank: int, world_size: int, index: Path, precision: str) -> dict[str, float]:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = ResNet(ModelConfig(depth=18, zero_init_residual=False), 10).to(memory_format=torch.channels_last)
    loader = EvalLoader(load_index(index), SMALL, LoaderContext(rank, world_size, CPU, 1), no_bad_image, batch=64)
    return evaluate(model, loader, precision=precision, device=CPU, in_parts=OomSplitter(pytest.fail)).scores()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_two_workers_count_359_and_score_as_one(index_of_359: Path, precision: str) -> None:
    one = scores(0, 1, index_of_359, precision)
    two = run_ranks(scores, 2, index_of_359, precision)
    assert one["count"] == 359
    assert two == [one, one]  # equal, not close


def test_more_ranks_than_chunks(index_of_359: Path) -> None:
    wide = run_ranks(scores_in_one_chunk, 3, index_of_359)
    assert wide[0]["count"] == 359
    assert wide == [wide[0]] * 3


def scores_in_one_chunk(rank: int, world_size: int, index: Path) -> dict[str, float]:
    torch.manual_seed(0)
    model = ResNet(ModelConfig(depth=18), 10)
    loader = EvalLoader(load_index(index), SMALL, LoaderContext(rank, world_size, CPU, 1), no_bad_image, batch=400)
    return evaluate(model, loader, precision="fp32", device=CPU, in_parts=OomSplitter(pytest.fail)).scores()


def test_figures_are_their_definitions(digits_index: Callable[[str], Path]) -> None:
    torch.manual_seed(0)
    model = ResNet(ModelConfig(depth=18, zero_init_residual=False), 10).train()
    index = load_index(digits_index("val"))
    loader = EvalLoader(index, SMALL, LoaderContext(0, 1, CPU, 2), no_bad_image, batch=128)
    found = evaluate(model, loader, precision="fp32", device=CPU, in_parts=OomSplitter(pytest.fail)).scores()
    assert model.training  # as it was
    ((_, batch),) = EvalLoader(index, SMALL, LoaderContext(0, 1, CPU, 2), no_bad_image, batch=360)
    with torch.inference_mode():
        logits = model.eval()(batch.images)
    assert found["top1"] == (logits.argmax(1) == batch.labels).double().mean().item()
    in_five = (logits.argsort(1, descending=True)[:, :5] == batch.labels[:, None]).any(1)
    assert found["top5"] == pytest.approx(in_five.double().mean().item())
    assert found["ece"] == pytest.approx(calibration_error(logits, batch.labels), abs=1e-6)
    assert found["loss"] == pytest.approx(F.cross_entropy(logits, batch.labels).item(), rel=1e-5)


def calibration_error(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Guo et al. 2017, eq. 3, bin by bin."""
    sure, taken = logits.double().softmax(1).max(1)
    total = 0.0
    for low in range(15):
        inside = (sure >= low / 15) & (sure < (low + 1) / 15)
        if inside.any():
            right = (taken == labels)[inside].double().mean()
            total += inside.double().mean().item() * abs(right - sure[inside].mean()).item()
    return total


def test_views_are_averaged(digits_index: Callable[[str], Path]) -> None:
    torch.manual_seed(0)
    model = ResNet(ModelConfig(depth=18, zero_init_residual=False), 10).eval()
    index = load_index(digits_index("val"))
    loader = EvalLoader(index, SMALL, LoaderContext(0, 1, CPU, 2), no_bad_image, batch=360, views="flip")
    found = evaluate(model, loader, precision="fp32", device=CPU, in_parts=OomSplitter(pytest.fail))
    ((_, batch),) = loader
    with torch.inference_mode():
        images = batch.images
        expected = (model(images).double().softmax(1) + model(images.flip(3)).double().softmax(1)) / 2
    best = expected.max(1)
    assert found.best[:, 0].tolist() == best.indices.tolist()
    assert found.probabilities[:, 0] == pytest.approx(best.values.numpy(), abs=1e-6)
    assert found.losses == pytest.approx(-expected[torch.arange(360), batch.labels].log().numpy(), abs=1e-5)


def test_outputs_that_are_not_finite_are_told(digits_index: Callable[[str], Path]) -> None:
    """As of weights whose statistics are damaged: no figure can be made of them."""
    index, model = load_index(digits_index("val")), ResNet(ModelConfig(depth=18), 10)
    model.get_buffer("bn1.running_var").fill_(-1.0)
    loader = EvalLoader(index, SMALL, LoaderContext(0, 1, CPU, 2), no_bad_image, batch=180)
    with pytest.raises(NonFiniteError, match=r"not finite for 360 of 360 evaluated images, first for 0/0020.jpg; "):
        evaluate(model, loader, precision="fp32", device=CPU, in_parts=OomSplitter(pytest.fail))


def test_buffers_become_rank_zeros() -> None:
    means = run_ranks(synced_means, 2)
    assert torch.equal(means[0][0], means[1][0])
    assert torch.equal(means[0][0], torch.full((64,), 1.0))
    assert means[0][1] == means[1][1]


def synced_means(rank: int, world_size: int) -> Any:
    model: Any = ResNet(ModelConfig(depth=18), 10)
    model.bn1.running_mean = torch.full((64,), float(rank + 1))
    sync_buffers(model)
    assert dist.is_initialized()
    return model.bn1.running_mean, model.layer4[1].bn2.running_var.sum().item()
