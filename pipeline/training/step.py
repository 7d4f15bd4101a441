"""One optimizer step over a global batch, with arithmetic that does not depend on how it is split.

Let G be the global batch, W the ranks, S_r rank r's sum of per-sample losses. DDP averages gradients
over ranks, so rank r backpropagates S_r W / G, and the average is the gradient of sum_r S_r / G: the
mean over the global batch, also where shares are uneven, and whether or not a rank accumulates it
over micro-batches.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from pipeline.config.training import TrainConfig
from pipeline.data.loading.loader import Batch
from pipeline.training.state import TrainState

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """Mixed precision for `precision`; does nothing for fp32."""
    assert precision in AUTOCAST, f"{precision}: not decided yet, see `pipeline.training.precision`"
    return torch.autocast(device.type, AUTOCAST[precision], enabled=precision != "fp32")


def unmarked(part: str) -> None:
    """Nobody wants to know how far a step is."""


def train_step(
    state: TrainState,
    net: nn.Module,
    batch: Batch,
    cfg: TrainConfig,
    *,
    lr: float,
    world_size: int,
    micro_batch: int | None = None,
    mark: Callable[[str], object] = unmarked,
) -> Tensor:
    """Advance `state` by one step.

    Args:
        net: `state.model`, wrapped in DDP where there are several ranks.
        batch: this rank's share of the global batch.
        micro_batch: images of it to compute at a time; None: as configured.
        mark: called with "forward", "backward" and "optimizer" as each begins.

    Returns:
        A scalar on the device, detached: this rank's part of the mean loss over the global batch; the
        sum over ranks is the mean. Nothing here waits for the device.
    """
    state.optimizer.zero_grad(set_to_none=True)
    loss_part = accumulate(state, net, batch, cfg, world_size=world_size, micro_batch=micro_batch, mark=mark)
    mark("optimizer")
    for group in state.optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
    if cfg.clip_norm is not None:
        state.scaler.unscale_(state.optimizer)
        nn.utils.clip_grad_norm_(state.model.parameters(), cfg.clip_norm)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.step += 1
    if cfg.ema_decay is not None:
        state.update_ema(cfg.ema_decay)
    return loss_part


def accumulate(
    state: TrainState,
    net: nn.Module,
    batch: Batch,
    cfg: TrainConfig,
    *,
    world_size: int,
    micro_batch: int | None = None,
    mark: Callable[[str], object] = unmarked,
) -> Tensor:
    """Add up the gradients of a batch, micro-batch by micro-batch; arguments and result as of `train_step`."""
    micro_batches = batch.split(micro_batch or cfg.micro_batch)
    loss_part = torch.zeros((), device=batch.labels.device)
    for i, micro in enumerate(micro_batches, 1):
        mark("forward")
        with _sync_gradients(net, i == len(micro_batches)):
            with autocast(cfg.precision, micro.images.device):
                logits = net(micro.images) if micro.drop_path_mask is None else net(micro.images, micro.drop_path_mask)
            loss = loss_sum(logits.float(), micro.labels, cfg)
            mark("backward")
            state.scaler.scale(loss * (world_size / cfg.global_batch)).backward()  # type: ignore[no-untyped-call]
        loss_part += loss.detach() / cfg.global_batch
    return loss_part


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


def _sync_gradients(net: nn.Module, now: bool) -> AbstractContextManager[None]:
    """All-reduce gradients in the last micro-batch's backward pass only."""
    return net.no_sync() if isinstance(net, DistributedDataParallel) and not now else nullcontext()
