"""The optimizer, and the learning rate as a pure function of the step (no scheduler state to forget)."""

import math
from dataclasses import dataclass

import torch
from torch import nn

from pipeline.config import Config, OptimConfig
from pipeline.data.sampling import steps_per_epoch


@dataclass(frozen=True)
class Schedule:
    """The lengths of a training, in steps."""

    steps_per_epoch: int
    num_steps: int

    @classmethod
    def create(cls, cfg: Config, num_samples: int) -> "Schedule":
        """Raises ConfigError where the images do not fill one global batch."""
        per_epoch = steps_per_epoch(num_samples, cfg.train.global_batch)
        return cls(per_epoch, cfg.train.steps or cfg.train.epochs * per_epoch)


def make_optimizer(model: nn.Module, cfg: OptimConfig) -> torch.optim.Optimizer:
    """SGD or AdamW over all parameters; weight decay only on those with ndim > 1.

    Biases and the normalisations' scales stay undecayed (Goyal et al. 2017; by shape, since names lie:
    `downsample.1` is a BatchNorm).
    """
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": cfg.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if cfg.name == "adamw":
        return torch.optim.AdamW(groups, lr=cfg.lr, betas=cfg.betas, fused=True)
    sgd = torch.optim.SGD(groups, lr=cfg.lr, momentum=cfg.momentum, nesterov=cfg.nesterov, fused=True)
    if cfg.momentum:
        # torch's fused SGD allocates its buffers without filling them, and a first step that fp16's
        # scaler skips leaves them so. From zeros the first step is the same: 0 m + g.
        for p in parameters:
            sgd.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return sgd


def lr_at(step: int, cfg: OptimConfig, schedule: Schedule) -> float:
    """The learning rate of `step` (0 is the first).

    Warm-up rises linearly, lr/n, 2 lr/n, ..., lr over its n steps (Goyal et al. 2017, 2.2). Then cosine
    (Loshchilov & Hutter 2017, eq. 5) or linear falls to `final_lr` at `num_steps`; "step" multiplies by
    `step_gamma` at each of `step_epochs`.
    """
    warmup = round(cfg.warmup_epochs * schedule.steps_per_epoch)
    if step < warmup:
        return cfg.lr * (step + 1) / warmup
    if cfg.schedule == "step":
        return cfg.lr * cfg.step_gamma ** sum(step >= epoch * schedule.steps_per_epoch for epoch in cfg.step_epochs)
    progress = (step - warmup) / max(1, schedule.num_steps - warmup)
    remaining = 1 - progress if cfg.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return cfg.final_lr + (cfg.lr - cfg.final_lr) * remaining
