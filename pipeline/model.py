"""The network of the paper: He et al. 2015, "Deep Residual Learning for Image Recognition", table 1.

Parameter and buffer names are torchvision's, so its published weights load unchanged, and for the
same weights the fp32 outputs are bitwise those of `torchvision.models.resnet*`. It exists beside
torchvision's for three things: the paper's own stride placement, normalisation as the network's
first op (the loader delivers uint8), and a frame in which later variants are a few lines.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.config import ModelConfig

# ImageNet's per-channel mean and standard deviation on pixels in 0..255: what every published
# ResNet weight file expects.
PIXEL_MEAN = (123.675, 116.28, 103.53)
PIXEL_STD = (58.395, 57.12, 57.375)


def conv3x3(in_planes: int, out_planes: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_planes, out_planes, 3, stride, padding=1, bias=False)


def conv1x1(in_planes: int, out_planes: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_planes, out_planes, 1, stride, bias=False)


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

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(out))
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

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = F.relu(self.bn2(self.conv2(out)), inplace=True)
        out = self.bn3(self.conv3(out))
        out += x if self.downsample is None else self.downsample(x)
        return F.relu(out, inplace=True)


Block = type[BasicBlock] | type[Bottleneck]

# Depth -> block and blocks per stage (the paper's table 1).
ARCHITECTURES: dict[int, tuple[Block, tuple[int, int, int, int]]] = {
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
    101: (Bottleneck, (3, 4, 23, 3)),
    152: (Bottleneck, (3, 8, 36, 3)),
}


class ResNet(nn.Module):
    """A residual network over images.

    Args:
        cfg: depth, stride placement ("3x3" is v1.5, "1x1" the paper's v1), zero-init of the last BN.
        num_classes: width of the last layer.
    """

    def __init__(self, cfg: ModelConfig, num_classes: int):
        super().__init__()
        block, depths = ARCHITECTURES[cfg.depth]
        self.in_planes = 64
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1 = self._stage(block, 64, depths[0], 1, cfg.stride_on)
        self.layer2 = self._stage(block, 128, depths[1], 2, cfg.stride_on)
        self.layer3 = self._stage(block, 256, depths[2], 2, cfg.stride_on)
        self.layer4 = self._stage(block, 512, depths[3], 2, cfg.stride_on)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(512 * block.expansion, num_classes)
        # Not persistent: torchvision's state dicts have no such entries.
        self.pixel_mean: Tensor
        self.pixel_std: Tensor
        self.register_buffer("pixel_mean", torch.tensor(PIXEL_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(PIXEL_STD).view(1, 3, 1, 1), persistent=False)
        self._initialise(cfg.zero_init_residual)

    def _stage(self, block: Block, planes: int, depth: int, stride: int, stride_on: str) -> nn.Sequential:
        out_planes = planes * block.expansion
        downsample = None
        if stride != 1 or self.in_planes != out_planes:  # projection shortcut, the paper's option B
            downsample = nn.Sequential(conv1x1(self.in_planes, out_planes, stride), nn.BatchNorm2d(out_planes))
        blocks = [block(self.in_planes, planes, stride, stride_on, downsample)]
        blocks += [block(out_planes, planes, 1, stride_on, None) for _ in range(1, depth)]
        self.in_planes = out_planes
        return nn.Sequential(*blocks)

    def _initialise(self, zero_init_residual: bool) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):  # He et al. 2015, "Delving Deep into Rectifiers"
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif zero_init_residual and isinstance(module, BasicBlock):  # Goyal et al. 2017, 5.1
                nn.init.zeros_(module.bn2.weight)
            elif zero_init_residual and isinstance(module, Bottleneck):
                nn.init.zeros_(module.bn3.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Map images to logits.

        Args:
            x: (N, 3, H, W); uint8 pixels in 0..255, or floats that are normalised already.

        Returns:
            (N, num_classes) logits.
        """
        if x.dtype == torch.uint8:
            x = (x - self.pixel_mean) / self.pixel_std
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = self.maxpool(x)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        logits: Tensor = self.fc(torch.flatten(self.avgpool(x), 1))
        return logits
