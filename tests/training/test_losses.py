"""Losses against their formulas written out, and against timm's."""

import pytest
import torch
from timm.loss import BinaryCrossEntropy

from pipeline.config.training import TrainConfig
from pipeline.training.step import loss_sum

CLASSES, IMAGES = 7, 5


@pytest.fixture
def logits() -> torch.Tensor:
    torch.manual_seed(0)
    return 3 * torch.randn(IMAGES, CLASSES)


LABELS = torch.tensor([0, 3, 6, 3, 1])
SHARES = 0.7 * torch.eye(CLASSES)[LABELS] + 0.3 * torch.eye(CLASSES)[LABELS.flip(0)]


@pytest.mark.parametrize("labels", [LABELS, SHARES], ids=["classes", "shares"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_is_its_formula(logits: torch.Tensor, labels: torch.Tensor, smoothing: float) -> None:
    shares = torch.eye(CLASSES)[labels] if labels.ndim == 1 else labels
    targets = (1 - smoothing) * shares + smoothing / CLASSES
    expected = -(targets * (logits - logits.exp().sum(1, keepdim=True).log())).sum()
    found = loss_sum(logits, labels, TrainConfig(label_smoothing=smoothing))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("labels", [LABELS, SHARES], ids=["classes", "shares"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("threshold", [None, 0.2])
def test_binary_cross_entropy_is_its_formula(
    logits: torch.Tensor, labels: torch.Tensor, smoothing: float, threshold: float | None
) -> None:
    shares = torch.eye(CLASSES)[labels] if labels.ndim == 1 else labels
    targets = (1 - smoothing) * shares + smoothing / CLASSES
    if threshold is not None:
        targets = (targets > threshold).float()
    sure = 1 / (1 + (-logits).exp())
    expected = -(targets * sure.log() + (1 - targets) * (1 - sure).log()).mean(1).sum()
    found = loss_sum(logits, labels, TrainConfig(loss="bce", label_smoothing=smoothing, bce_threshold=threshold))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("threshold", [None, 0.2])
def test_binary_cross_entropy_is_timms(logits: torch.Tensor, threshold: float | None) -> None:
    theirs = BinaryCrossEntropy(smoothing=0.1, target_threshold=threshold)(logits, LABELS)
    ours = loss_sum(logits, LABELS, TrainConfig(loss="bce", label_smoothing=0.1, bce_threshold=threshold))
    torch.testing.assert_close(ours / IMAGES, theirs)
