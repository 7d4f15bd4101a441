"""The optimizer."""

from typing import Any

import torch
from torch import nn

from pipeline.config.training import OptimConfig
from pipeline.models.resnet import PARTS


def make_optimizer(model: nn.Module, cfg: OptimConfig) -> torch.optim.Optimizer:
    """The optimizer over all parameters that are not frozen; weight decay only on those with ndim > 1.

    Biases and the normalisations' scales stay undecayed (Goyal et al. 2017; by shape, since names lie:
    `downsample.1` is a BatchNorm). Each group's "lr_scale" is by which its learning rate differs from the schedule's:
    layer_decay to the power of the parts between it and the last layer (as in Clark et al. 2020, ELECTRA).
    """
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    depth = {module: i for i, modules in enumerate(PARTS.values()) for module in modules}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            above = len(PARTS) - 1 - depth.get(name.partition(".")[0], len(PARTS) - 1)
            groups.setdefault((cfg.layer_decay**above, parameter.ndim > 1), []).append(parameter)
    return _make(
        [
            {"params": params, "weight_decay": cfg.weight_decay if decayed else 0.0, "lr_scale": scale}
            for (scale, decayed), params in groups.items()
        ],
        cfg,
    )


def _make(groups: list[dict[str, Any]], cfg: OptimConfig) -> torch.optim.Optimizer:
    match cfg.name:
        case "adamw":
            return torch.optim.AdamW(groups, lr=cfg.lr, betas=cfg.betas, fused=True)
        case "lamb":
            from timm.optim import Lamb  # late: timm takes seconds to import

            return Lamb(groups, lr=cfg.lr, betas=cfg.betas)  # type: ignore[no-any-return]
        case "lars":
            from timm.optim import Lars

            return Lars(groups, lr=cfg.lr, momentum=cfg.momentum, nesterov=cfg.nesterov)  # type: ignore[no-any-return]
    sgd = torch.optim.SGD(groups, lr=cfg.lr, momentum=cfg.momentum, nesterov=cfg.nesterov, fused=True)
    if cfg.momentum:
        # torch's fused SGD allocates its buffers without filling them, and a first step that fp16's
        # scaler skips leaves them so. From zeros the first step is the same: 0 m + g.
        for p in (p for group in groups for p in group["params"]):
            sgd.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return sgd
