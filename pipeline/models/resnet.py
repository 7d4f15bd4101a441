"""The network of the paper: He et al. 2015, "Deep Residual Learning for Image Recognition", table 1.

Parameter and buffer names are torchvision's, so its published weights load unchanged, and for the
same weights the fp32 outputs are bitwise those of `torchvision.models.resnet*`. Variant "d" has timm's names. It
exists beside theirs for the paper's own stride placement, normalisation as the network's first op (the loader delivers
uint8), stochastic depth whose draws come from outside, as all of the stream's do, and frozen and recomputed parts.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from pipeline.config.training import ModelConfig

# ImageNet's per-channel mean and standard deviation on pixels in 0..255: what every published
# ResNet weight file expects.
PIXEL_MEAN = (123.675, 116.28, 103.53)
PIXEL_STD = (58.395, 57.12, 57.375)
# The network's parts, from the images on, by the modules that they consist of.
PARTS = {
    "stem": ("conv1", "bn1"),
    **{stage: (stage,) for stage in ("layer1", "layer2", "layer3", "layer4")},
    "fc": ("fc",),
}


class Conv2d(nn.Conv2d):
    """torch's, with He's initialisation (He et al. 2015, "Delving Deep into Rectifiers") in place of its own."""

    def reset_parameters(self) -> None:
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")


def conv3x3(in_planes: int, out_planes: int, stride: int = 1) -> nn.Conv2d:
    return Conv2d(in_planes, out_planes, 3, stride, padding=1, bias=False)


def conv1x1(in_planes: int, out_planes: int, stride: int = 1) -> nn.Conv2d:
    return Conv2d(in_planes, out_planes, 1, stride, bias=False)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions (the paper's fig. 5, left): depths 18 and 34."""

    expansion = 1

    def __init__(self, in_planes: int, planes: int, stride: int, stride_on: str, downsample: nn.Module | None):
        super().__init__()
        # `stride_on` makes no difference here: the block's first convolution is a 3x3 in both variants.
        self.conv1 = conv3x3(in_planes, planes, stride)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = conv3x3(planes, planes)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = downsample

    def forward(self, x: Tensor, drop_path_mask: Tensor | None = None) -> Tensor:
        """drop_path_mask: (N,) factors of the residual branch, for stochastic depth."""
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = _scaled(self.bn2(self.conv2(out)), drop_path_mask)
        out += x if self.downsample is None else self.downsample(x)
        return F.relu(out, inplace=True)


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions (the paper's fig. 5, right): depths 50, 101 and 152."""

    expansion = 4

    def __init__(self, in_planes: int, planes: int, stride: int, stride_on: str, downsample: nn.Module | None):
        super().__init__()
        first, second = (stride, 1) if stride_on == "1x1" else (1, stride)
        self.conv1 = conv1x1(in_planes, planes, first)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = conv3x3(planes, planes, second)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = conv1x1(planes, planes * self.expansion)
        self.bn3 = nn.BatchNorm2d(planes * self.expansion)
        self.downsample = downsample

    def forward(self, x: Tensor, drop_path_mask: Tensor | None = None) -> Tensor:
        """drop_path_mask: (N,) factors of the residual branch, for stochastic depth."""
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = F.relu(self.bn2(self.conv2(out)), inplace=True)
        out = _scaled(self.bn3(self.conv3(out)), drop_path_mask)
        out += x if self.downsample is None else self.downsample(x)
        return F.relu(out, inplace=True)


def _scaled(branch: Tensor, factors: Tensor | None) -> Tensor:
    return branch if factors is None else branch * factors.to(branch.dtype)[:, None, None, None]


Block = type[BasicBlock] | type[Bottleneck]

# Depth -> block and blocks per stage (the paper's table 1).
ARCHITECTURES: dict[int, tuple[Block, tuple[int, int, int, int]]] = {
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
    101: (Bottleneck, (3, 4, 23, 3)),
    152: (Bottleneck, (3, 8, 36, 3)),
}


def _deep_stem() -> nn.Sequential:
    """ResNet-C's and -D's: three 3x3 convolutions for the 7x7 (He et al. 2018, "Bag of Tricks", fig. 2b)."""
    return nn.Sequential(
        conv3x3(3, 32, 2),
        nn.BatchNorm2d(32),
        nn.ReLU(inplace=True),
        conv3x3(32, 32),
        nn.BatchNorm2d(32),
        nn.ReLU(inplace=True),
        conv3x3(32, 64),
    )


def _shortcut(in_planes: int, out_planes: int, stride: int, variant: str) -> nn.Sequential:
    """The paper's projection (option B); ResNet-D averages first, so that no pixel goes unseen (ibid., fig. 2c)."""
    if variant == "plain":
        return nn.Sequential(conv1x1(in_planes, out_planes, stride), nn.BatchNorm2d(out_planes))
    pool = nn.AvgPool2d(2, stride, ceil_mode=True, count_include_pad=False) if stride > 1 else nn.Identity()
    return nn.Sequential(pool, conv1x1(in_planes, out_planes), nn.BatchNorm2d(out_planes))


def _contexts(block: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Of a block's first pass and of its second, in which BatchNorms must not count the same images again."""
    return nullcontext(), _statistics_kept(block)


@contextmanager
def _statistics_kept(block: nn.Module) -> Iterator[None]:
    norms = [m for m in block.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, torch.zeros(())
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count


def drop_rates(cfg: ModelConfig) -> list[float]:
    """Of each residual block, how often it is skipped: linear in its depth (Huang et al. 2016, eq. 4); none without."""
    if cfg.drop_path == 0:
        return []
    _, depths = ARCHITECTURES[cfg.depth]
    last = sum(depths) - 1
    return [cfg.drop_path * i / last for i in range(last + 1)]


class ResNet(nn.Module):
    """A residual network over images.

    Args:
        cfg: depth, stride placement ("3x3" is v1.5, "1x1" the paper's v1), variant, what is frozen, and so on.
        num_classes: width of the last layer.
    """

    def __init__(self, cfg: ModelConfig, num_classes: int):
        super().__init__()
        block_type, depths = ARCHITECTURES[cfg.depth]
        self.in_planes = 64
        self.conv1 = _deep_stem() if cfg.variant == "d" else Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1 = self._stage(block_type, 64, depths[0], 1, cfg)
        self.layer2 = self._stage(block_type, 128, depths[1], 2, cfg)
        self.layer3 = self._stage(block_type, 256, depths[2], 2, cfg)
        self.layer4 = self._stage(block_type, 512, depths[3], 2, cfg)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(512 * block_type.expansion, num_classes)
        # Not persistent: torchvision's state dicts have no such entries.
        self.pixel_mean: Tensor
        self.pixel_std: Tensor
        self.register_buffer("pixel_mean", torch.tensor(PIXEL_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(PIXEL_STD).view(1, 3, 1, 1), persistent=False)
        if cfg.zero_init_residual:  # Goyal et al. 2017, 5.1
            for block in self.blocks:
                last = "bn2" if isinstance(block, BasicBlock) else "bn3"
                nn.init.zeros_(block.get_parameter(f"{last}.weight"))
        self._recompute = cfg.activation_checkpointing
        parts = ["none", *PARTS]
        frozen = parts[1 : parts.index(cfg.freeze) + 1]
        self._frozen = [name for part in frozen for name in PARTS[part]]
        for name in self._frozen:
            self.get_submodule(name).requires_grad_(False)
        self.train()

    def _stage(self, block: Block, planes: int, depth: int, stride: int, cfg: ModelConfig) -> nn.Sequential:
        out_planes = planes * block.expansion
        downsample = None
        if stride != 1 or self.in_planes != out_planes:
            downsample = _shortcut(self.in_planes, out_planes, stride, cfg.variant)
        blocks = [block(self.in_planes, planes, stride, cfg.stride_on, downsample)]
        blocks += [block(out_planes, planes, 1, cfg.stride_on, None) for _ in range(1, depth)]
        self.in_planes = out_planes
        return nn.Sequential(*blocks)

    def train(self, mode: bool = True) -> "ResNet":
        """As any module's; but frozen parts stay in eval mode, so that their BatchNorms do not follow the data."""
        super().train(mode)
        for name in self._frozen:
            self.get_submodule(name).eval()
        return self

    @property
    def blocks(self) -> list[nn.Module]:
        """All residual blocks, in the images' order."""
        return [block for stage in (self.layer1, self.layer2, self.layer3, self.layer4) for block in stage]

    def forward(self, x: Tensor, drop_path_mask: Tensor | None = None) -> Tensor:
        """Map images to logits.

        Args:
            x: (N, 3, H, W); uint8 pixels in 0..255, or floats that are normalised already.
            drop_path_mask: (N, blocks) factors of the residual branches, for stochastic depth; None for all 1.

        Returns:
            (N, num_classes) logits.
        """
        if x.dtype == torch.uint8:
            x = (x - self.pixel_mean) / self.pixel_std
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = self.maxpool(x)
        recompute = self._recompute and self.training and torch.is_grad_enabled()
        for i, block in enumerate(self.blocks):
            factors = None if drop_path_mask is None else drop_path_mask[:, i]
            if recompute:
                x = checkpoint(block, x, factors, use_reentrant=False, context_fn=lambda block=block: _contexts(block))
            else:
                x = block(x, factors)
        logits: Tensor = self.fc(torch.flatten(self.avgpool(x), 1))
        return logits
