"""The lengths of a training, and the learning rate as a pure function of the step (no scheduler state to forget)."""

import math
from dataclasses import dataclass

from pipeline.config.schema import Config
from pipeline.config.training import OptimConfig
from pipeline.data.stream import steps_per_epoch


@dataclass(frozen=True)
class Schedule:
    """The lengths of a training, in steps, and what its global batch makes of the learning rate."""

    steps_per_epoch: int
    num_steps: int
    lr_factor: float = 1.0

    @classmethod
    def create(cls, cfg: Config, num_samples: int) -> "Schedule":
        """Raises UserError where the images do not fill one global batch."""
        per_epoch = steps_per_epoch(num_samples, cfg.train.global_batch)
        num_steps = cfg.train.steps or cfg.train.epochs * per_epoch
        return cls(per_epoch, num_steps, lr_factor(cfg.optim, cfg.train.global_batch))


def lr_factor(cfg: OptimConfig, global_batch: int) -> float:
    """What to multiply lr and final_lr with: 1, or n or sqrt(n) for n times the batch that they are for.

    Linear for SGD: Goyal et al. 2017, section 2.1. The square root for LAMB: You et al. 2020, section 4.
    """
    ratio = global_batch / (cfg.lr_batch or global_batch)
    return {"none": 1.0, "linear": ratio, "sqrt": math.sqrt(ratio)}[cfg.lr_scaling]


def lr_note(cfg: Config) -> str | None:
    """A line for the user where the global batch is another than the one that the learning rate is for."""
    optim, batch = cfg.optim, cfg.train.global_batch
    if optim.lr_batch in (None, batch):
        return None
    now = optim.lr * lr_factor(optim, batch)
    return (
        f"optim.lr={optim.lr:g} is for a global batch of {optim.lr_batch}; with {batch} images it is {now:g} "
        f"(optim.lr_scaling={optim.lr_scaling})"
    )


def lr_at(step: int, cfg: OptimConfig, schedule: Schedule) -> float:
    """The learning rate of `step` (0 is the first).

    Warm-up rises linearly, lr/n, 2 lr/n, ..., lr over its n steps (Goyal et al. 2017, 2.2). Then cosine
    (Loshchilov & Hutter 2017, eq. 5) or linear falls to `final_lr` at `num_steps`; "step" multiplies by
    `step_gamma` at each of `step_epochs`. All of it times the schedule's `lr_factor`.
    """
    return schedule.lr_factor * _lr_at(step, cfg, schedule)


def _lr_at(step: int, cfg: OptimConfig, schedule: Schedule) -> float:
    warmup = round(cfg.warmup_epochs * schedule.steps_per_epoch)
    if step < warmup:
        return cfg.lr * (step + 1) / warmup
    if cfg.schedule == "step":
        return cfg.lr * cfg.step_gamma ** sum(step >= epoch * schedule.steps_per_epoch for epoch in cfg.step_epochs)
    progress = (step - warmup) / max(1, schedule.num_steps - warmup)
    remaining = 1 - progress if cfg.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return cfg.final_lr + (cfg.lr - cfg.final_lr) * remaining
