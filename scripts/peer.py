"""One rank of a contestant of bench_peers.py: the loops that people train with, and ours without its surroundings.

torchvision: the loop, transforms and DataLoader of torchvision's reference training. timm: the same loop with timm's
model, loader and optimizer. ceiling: our `train_step` on one batch that lies ready. fit: our `fit` without Ray, its
records for MLflow left unsent. Started by torchrun with the settings as one JSON object.

The peers get every benefit of the doubt: no accuracies at each step, no DDP around a single rank, the loss read at
every tenth step, DataLoader workers that live on, and an epoch of so many images that its end is rarely met.
"""

import json
import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler

CPU = torch.device("cpu")
REPEATS = 200  # of the images in a peer's epoch
LOG_EVERY = 10  # steps
LABEL_SMOOTHING = 0.1
LR, MOMENTUM, WEIGHT_DECAY = 0.01, 0.9, 1e-4
FROZEN = timedelta(days=1)  # that the others' turns may last


@dataclass(frozen=True)
class Peer:
    """What a rank is to do. batch: global. progress: the file for rank 0's steps. config, overrides: of our own."""

    kind: str
    data: str
    depth: int
    size: int
    batch: int
    precision: str
    progress: str
    ranks: int
    threads: int
    workers: int = 0
    channels_last: bool = True
    fused: bool = True
    config: str = ""
    overrides: list[str] = field(default_factory=list)


def main() -> None:
    peer = Peer(**json.loads(sys.argv[1]))
    rank = int(os.environ["RANK"])
    torch.set_num_threads(peer.threads)
    if peer.ranks > 1:
        dist.init_process_group("gloo", timeout=FROZEN)
    if peer.kind == "fit":
        fit(peer, rank)
        return
    steps = {"torchvision": torchvision_steps, "timm": timm_steps, "ceiling": ceiling_steps}[peer.kind](peer, rank)
    with Path(peer.progress).open("a", encoding="utf-8") if rank == 0 else nullcontext() as file:
        for _ in steps:
            if file:
                print(json.dumps({"time": time.monotonic()}), file=file, flush=True)


def torchvision_steps(peer: Peer, rank: int) -> Iterator[None]:
    from torchvision.models import get_model
    from torchvision.transforms import v2

    transform = v2.Compose(
        [
            v2.RandomResizedCrop(peer.size, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.PILToTensor(),
            v2.ToDtype(torch.float, scale=True),
            v2.Normalize(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
        ]
    )
    folder = _folder(peer, transform)
    sampler: Any = DistributedSampler(folder, peer.ranks, rank) if peer.ranks > 1 else RandomSampler(folder)
    loader = DataLoader(
        folder,
        peer.batch // peer.ranks,
        sampler=sampler,
        num_workers=peer.workers,
        persistent_workers=peer.workers > 0,
        drop_last=True,
    )
    model = get_model(f"resnet{peer.depth}", weights=None, num_classes=len(folder.classes))
    if peer.channels_last:
        model = model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=LR,
        momentum=MOMENTUM,
        weight_decay=WEIGHT_DECAY,
        fused=peer.fused,
        foreach=not peer.fused,
    )
    return _train(peer, model, optimizer, loader)


def timm_steps(peer: Peer, rank: int) -> Iterator[None]:
    import timm
    from timm.data import create_loader
    from timm.optim import create_optimizer_v2

    folder = _folder(peer, None)
    loader = create_loader(
        folder,
        peer.size,
        peer.batch // peer.ranks,
        is_training=True,
        color_jitter=None,
        interpolation="bilinear",
        num_workers=peer.workers,
        distributed=peer.ranks > 1,
        device=CPU,
    )
    model = timm.create_model(f"resnet{peer.depth}", num_classes=len(folder.classes))
    if peer.channels_last:
        model = model.to(memory_format=torch.channels_last)
    settings: dict[str, Any] = {"fused": True} if peer.fused else {"foreach": True}
    optimizer = create_optimizer_v2(model, "momentum", lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, **settings)
    return _train(peer, model, optimizer, loader)


def _folder(peer: Peer, transform: Any) -> Any:
    from torchvision.datasets import ImageFolder

    folder = ImageFolder(peer.data, transform)  # decodes with PIL; timm sets its own transform
    folder.samples = folder.samples * REPEATS
    return folder


def _train(peer: Peer, model: nn.Module, optimizer: Any, loader: Iterable[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """The loop of both: torchvision's `train_one_epoch`, and timm's with AMP."""
    criterion = nn.CrossEntropyLoss(label_smoothing=LABEL_SMOOTHING)
    net = DistributedDataParallel(model) if peer.ranks > 1 else model
    net.train()
    step = 0
    while True:
        for images, labels in loader:
            if peer.channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16, enabled=peer.precision == "bf16"):
                loss = criterion(net(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            if step % LOG_EVERY == 0:
                loss.item()
            yield


def ceiling_steps(peer: Peer, rank: int) -> Iterator[None]:
    from pipeline.config.loading import load
    from pipeline.data.loading.loader import Batch
    from pipeline.training.state import TrainState
    from pipeline.training.step import train_step

    cfg, share, classes = load(Path(peer.config), peer.overrides), peer.batch // peer.ranks, _num_classes(peer)
    state = TrainState.create(cfg, classes, CPU)
    net: nn.Module = state.model
    if peer.ranks > 1:  # as `fit` makes it
        net = DistributedDataParallel(state.model, forward_sync_buffers=False, gradient_as_bucket_view=True)
    images = torch.randint(0, 256, (share, 3, peer.size, peer.size), dtype=torch.uint8)
    images = images.contiguous(memory_format=torch.channels_last)
    batch = Batch(images, torch.randint(0, classes, (share,)), np.arange(share))
    while True:
        train_step(state, net, batch, cfg.train, lr=cfg.optim.lr, world_size=peer.ranks)
        yield


def _num_classes(peer: Peer) -> int:
    return sum(entry.is_dir() for entry in Path(peer.data).iterdir())


def fit(peer: Peer, rank: int) -> None:
    from pipeline.config.loading import load
    from pipeline.runs.spec import RunSpec, WorkerContext
    from pipeline.tracking.mlflow_logger import MlflowLogger
    from pipeline.training import loop, open_run

    with mock.patch.object(MlflowLogger, "_send_all"):
        context = WorkerContext(rank, peer.ranks, CPU, peer.threads, lambda event: None)
        cfg = load(Path(peer.config), peer.overrides)
        with open_run.open_run(cfg, lambda event: None) if rank == 0 else nullcontext() as spec:
            specs: list[RunSpec | None] = [spec]
            if peer.ranks > 1:
                dist.broadcast_object_list(specs, src=0)
            assert specs[0] is not None
            loop.fit(specs[0], context)


if __name__ == "__main__":
    main()
