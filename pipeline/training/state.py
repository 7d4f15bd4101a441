"""`TrainState`: the only mutable thing that outlives a step, and so all that a checkpoint must hold.

Data position and learning rate are functions of `step`; nothing else remembers anything.
"""

from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.config.schema import Config
from pipeline.errors import UserError
from pipeline.failures import NonFiniteError
from pipeline.models.resnet import ResNet
from pipeline.models.state_dict import load_weights
from pipeline.training.optim import make_optimizer

Pair = tuple[list[Tensor], list[Tensor]]


@dataclass
class TrainState:
    """step: optimizer steps done. ema: averaged weights, if kept. best_top1: of all evaluations so far."""

    model: ResNet
    ema: ResNet | None
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    step: int = 0
    best_top1: float = -1.0
    _pairs: "tuple[Pair, Pair] | None" = field(default=None, repr=False)  # of `update_ema`

    @classmethod
    def create(cls, cfg: Config, num_classes: int, device: torch.device) -> "TrainState":
        """The state before step 0: the same on every rank, by the seed."""
        torch.manual_seed(cfg.run.seed)
        model = ResNet(cfg.model, num_classes).to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        if cfg.model.sync_bn:
            if device.type == "cpu":
                raise UserError("model.sync_bn=true: torch has it for GPUs alone; set it to false")
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
        ema = deepcopy(model).requires_grad_(False) if cfg.train.ema_decay else None
        scaler = torch.amp.GradScaler(device.type, enabled=cfg.train.precision == "fp16")
        return cls(model, ema, make_optimizer(model, cfg.optim), scaler)

    @property
    def best_model(self) -> ResNet:
        """What is evaluated, exported and published: the averaged weights where there are any."""
        return self.model if self.ema is None else self.ema

    @torch.no_grad()
    def update_ema(self, decay: float) -> None:
        """ema <- d ema + (1 - d) model, over parameters and BN statistics, after `step` steps.

        d = min(decay, (1 + step) / (10 + step)), so that the first steps' weights fade (TensorFlow's
        ExponentialMovingAverage with num_updates).
        """
        if self.ema is None:
            return
        decay = min(decay, (1 + self.step) / (10 + self.step))
        if self._pairs is None:  # to walk through both networks takes longer than all that is computed here
            self._pairs = _pairs(self.ema, self.model)
        (averaged, current), (counts, current_counts) = self._pairs
        torch._foreach_lerp_(averaged, current, 1 - decay)
        if counts:
            torch._foreach_copy_(counts, current_counts)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values only, sharing the live tensors' memory."""
        return {
            "step": self.step,
            "best_top1": self.best_top1,
            "model": self.model.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "optimizer": {"kind": type(self.optimizer).__name__, **self.optimizer.state_dict()},
            "scaler": self.scaler.state_dict(),
        }

    def finite_state_dict(self) -> dict[str, Any]:
        """`state_dict`, to be saved; raises NonFiniteError where it is useless: every resume would begin with it."""
        self.check_finite()
        return self.state_dict()

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Take over a saved state.

        Raises:
            ValueError: it belongs to another network; the message says where they differ.
        """
        load_weights(self.model, saved["model"])
        if self.ema is not None:  # a run that begins to average starts from the weights it has
            load_weights(self.ema, saved["ema"] or saved["model"])
        self._load_optimizer(saved["optimizer"])
        if self.scaler.is_enabled() and saved["scaler"]:
            self.scaler.load_state_dict(saved["scaler"])
        self.step, self.best_top1 = saved["step"], saved["best_top1"]

    @torch.no_grad()
    def check_finite(self) -> None:
        """Raise NonFiniteError, naming the first tensor, where what is learned or averaged is NaN or infinite.

        By each tensor's norm, which takes as long as the copy that is saved; the largest value takes eight times that.
        """
        named = [(f"model.{name}", t) for name, t in self.model.state_dict().items()]
        named += [(f"ema.{name}", t) for name, t in (self.ema.state_dict() if self.ema else {}).items()]
        for i, values in self.optimizer.state_dict()["state"].items():
            named += [(f"optimizer.{i}.{name}", t) for name, t in values.items() if isinstance(t, Tensor)]
        named = [(name, t) for name, t in named if t.is_floating_point() and t.numel()]
        by_device: dict[torch.device, list[tuple[str, Tensor]]] = {}  # Adam counts its steps on the CPU
        for name, t in named:
            by_device.setdefault(t.device, []).append((name, t))
        for group in by_device.values():
            norms = torch.stack([norm.float() for norm in torch._foreach_norm([t for _, t in group])])
            for i in norms.isfinite().logical_not().nonzero().flatten().tolist():
                name, t = group[i]
                if not t.isfinite().all():  # else its squares are too large
                    what = f"{name} is not finite after step {self.step}, which is not saved"
                    raise NonFiniteError(f"{what}; checkpoints before it are untouched")

    def _load_optimizer(self, saved: dict[str, Any]) -> None:
        """torch checks neither whose state it is nor its shapes."""
        kind = type(self.optimizer).__name__
        if saved["kind"] != kind:
            raise ValueError(f"its optimizer is {saved['kind']}, and optim.name makes this one {kind}")
        names = {id(p): name for name, p in self.model.named_parameters()}
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        for i, values in saved["state"].items():
            for key, value in values.items():
                if value.ndim > 0 and value.shape != parameters[i].shape:
                    raise ValueError(
                        f"{key} of {names[id(parameters[i])]} is {tuple(value.shape)} in the saved optimizer and "
                        f"{tuple(parameters[i].shape)} in the model"
                    )
        settings = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict({k: v for k, v in saved.items() if k != "kind"})
        for group, own in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(own)  # torch takes the saved ones, and the configuration's would have no effect


def _pairs(averaged: nn.Module, current: nn.Module) -> "tuple[Pair, Pair]":
    """Of two networks what is averaged, and BN's counts of batches, which are not."""
    pairs = list(zip(averaged.state_dict().values(), current.state_dict().values(), strict=True))
    floats = [pair for pair in pairs if pair[0].is_floating_point()]
    counts = [pair for pair in pairs if not pair[0].is_floating_point()]
    return tuple(([a for a, _ in some], [b for _, b in some]) for some in (floats, counts))  # type: ignore[return-value]
