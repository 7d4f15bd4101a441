"""Exact evaluation: every sample once, and the same figures for every world size, to the last bit.

Each chunk of samples is evaluated whole by one rank, whatever the number of ranks, and what the model says of
each sample goes into the sample's own row of a table. One all-reduce adds zeros to the rows, and every figure is
computed from the whole table, so neither rounding nor order depends on who computed what. Nor does it depend on which
kernels were the quickest when cuDNN tried them: it chooses by shapes.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.data.loading.loader import EvalLoader
from pipeline.data.loading.to_device import to_device
from pipeline.failures import NonFiniteError
from pipeline.tracking.metrics import TOP, Predictions
from pipeline.training.backends import kernels_by_shape
from pipeline.training.microbatch import OomSplitter
from pipeline.training.step import autocast


class StoppedError(Exception):
    """The evaluation was to leave off; nothing is known of the weights."""


@torch.inference_mode()
@kernels_by_shape()
def evaluate(
    model: nn.Module,
    loader: EvalLoader,
    *,
    precision: str,
    device: torch.device,
    in_parts: OomSplitter,
    heartbeat: Callable[[], None] = lambda: None,
    stopped: Callable[[], bool] = lambda: False,
) -> Predictions:
    """What the model says of each sample of the loader's index; on every rank alike.

    Call it on all ranks, with equal weights and statistics (see `sync_buffers`).

    Args:
        in_parts: of the attempt, which knows how many images fit.
        heartbeat: called with each chunk.
        stopped: whether to leave off, asked before each chunk; equally often on all ranks, which must hear the same.

    Raises:
        StoppedError: it was to leave off.
        NonFiniteError: an output is not finite.
    """
    was_training = model.training
    model.eval()
    table = torch.zeros(len(loader.index), 1 + 2 * TOP, dtype=torch.float64, device=device)
    chunks = iter(loader)
    for _ in range(loader.max_chunks):
        if stopped():
            model.train(was_training)
            raise StoppedError
        if (item := next(chunks, None)) is None:  # other ranks have one more
            continue
        _, batch = item
        rows = to_device(batch.rows, device)
        logs = log_probabilities(model, loader.views(batch.images), precision, in_parts)
        losses = F.nll_loss(logs, batch.labels, reduction="none")
        likeliest = logs.topk(min(TOP, logs.shape[1]))
        padding = (0, TOP - likeliest.indices.shape[1])
        places = F.pad(likeliest.indices.double(), padding, value=-1)
        table[rows] = torch.cat([losses[:, None], places, F.pad(likeliest.values.exp(), padding)], 1)
        heartbeat()
    model.train(was_training)
    if dist.is_initialized():
        dist.all_reduce(table)
    predictions = table.cpu().numpy()
    (lost,) = np.nonzero(~np.isfinite(predictions).all(1))
    if len(lost):
        raise NonFiniteError(
            f"the network's outputs are not finite for {len(lost)} of {len(predictions)} evaluated images, first for "
            f"{loader.index.path(int(lost[0]))}; its weights or BatchNorm's statistics have gone astray"
        )
    labels, best = loader.index.labels.astype(np.int64), predictions[:, 1 : 1 + TOP].astype(np.int64)
    return Predictions(labels, best, predictions[:, 1 + TOP :], predictions[:, 0])


def log_probabilities(model: nn.Module, views: Sequence[Tensor], precision: str, in_parts: OomSplitter) -> Tensor:
    """Logarithms of the classes' probabilities (B, C), float64: of the mean over views (B, 3, S, S) of the same images.

    He et al. 2015, section 3.4, average scores, too.
    """

    def compute(images: Tensor) -> Tensor:
        with autocast(precision, images.device):
            logits: Tensor = model(images)
        return logits.double().log_softmax(1)

    logs = [in_parts(compute, images) for images in views]
    return torch.stack(logs).logsumexp(0) - math.log(len(logs))


def sync_buffers(model: nn.Module) -> None:
    """Give every rank rank 0's BN statistics, which are what a checkpoint holds.

    DDP could do this before each forward pass; training never reads them, so doing it before an
    evaluation is enough.
    """
    if not dist.is_initialized():
        return
    buffers = [b for b in model.buffers() if b.is_floating_point()]
    flat = torch.cat([b.flatten() for b in buffers])
    dist.broadcast(flat, src=0)
    for buffer, values in zip(buffers, torch.split(flat, [b.numel() for b in buffers]), strict=True):
        buffer.copy_(values.view_as(buffer))
