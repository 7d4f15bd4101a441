"""What a step minimises."""

from torch import Tensor
from torch.nn import functional as F

from pipeline.config import TrainConfig


def loss_sum(logits: Tensor, labels: Tensor, cfg: TrainConfig) -> Tensor:
    """The sum of the images' losses, a scalar.

    Cross-entropy with label smoothing (Szegedy et al. 2016, section 7), or binary cross-entropy, the mean over the
    classes (Wightman et al. 2021, "ResNet strikes back", section 2): targets are the classes' shares of the image,
    smoothed to t (1 - s) + s / C; where there is a threshold, then 1 above it and else 0.

    Args:
        logits: (B, C) float32.
        labels: (B,) int64, or (B, C) float32, each class's share.
    """
    if cfg.loss == "cross_entropy":
        return F.cross_entropy(logits, labels, reduction="sum", label_smoothing=cfg.label_smoothing)
    num_classes = logits.shape[1]
    shares = F.one_hot(labels, num_classes).to(logits.dtype) if labels.ndim == 1 else labels
    targets = shares * (1 - cfg.label_smoothing) + cfg.label_smoothing / num_classes
    if cfg.bce_threshold is not None:
        targets = (targets > cfg.bce_threshold).to(logits.dtype)
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="sum") / num_classes
