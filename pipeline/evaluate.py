"""Exact evaluation: every sample once, and the same figures for every world size, to the last bit.

Each chunk of samples is evaluated whole by one rank, whatever the number of ranks, and its sums go
into the chunk's own row of a table. The rows are added up only after one all-reduce, which adds zeros
to them, so neither rounding nor order depends on who computed what.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from pipeline.data.loader import EvalLoader
from pipeline.step import autocast


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader: EvalLoader,
    *,
    precision: str,
    device: torch.device,
    heartbeat: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Top-1, top-5 and mean cross-entropy over the loader's whole index; on every rank alike.

    Call it on all ranks, with equal weights and statistics (see `sync_buffers`).

    Args:
        heartbeat: called with each chunk.

    Returns:
        {"top1", "top5": shares in 0..1, "loss": nats, "count": samples}
    """
    was_training = model.training
    model.eval()
    table = torch.zeros(loader.num_chunks, 4, dtype=torch.float64, device=device)
    for chunk, batch in loader:
        with autocast(precision, device):
            logits = model(batch.images).float()
        ranking = logits.topk(min(5, logits.shape[1])).indices == batch.labels[:, None]
        loss = F.cross_entropy(logits, batch.labels, reduction="sum")
        count = torch.tensor(len(batch.labels), device=device)
        heartbeat()
        table[chunk] = torch.stack([count, ranking[:, 0].sum(), ranking.sum(), loss]).double()
    model.train(was_training)
    if dist.is_initialized():
        dist.all_reduce(table)
    count, top1, top5, loss = table.sum(0).tolist()
    assert count == len(loader.index), f"evaluated {count:g} of {len(loader.index)} samples"
    return {"top1": top1 / count, "top5": top5 / count, "loss": loss / count, "count": count}


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
