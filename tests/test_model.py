"""The network against torchvision's and the paper's."""

import pytest
import torch
import torchvision

from pipeline.config import ModelConfig
from pipeline.model import ARCHITECTURES, PIXEL_MEAN, PIXEL_STD, ResNet
from pipeline.state import load_weights

# torchvision's model pages; 152 also by the layer sizes of the paper's table 1.
PARAMETERS = {18: 11_689_512, 34: 21_797_672, 50: 25_557_032, 101: 44_549_160, 152: 60_192_808}


def network(depth: int, stride_on: str = "3x3", zero_init: bool = False) -> ResNet:
    torch.manual_seed(0)
    cfg = ModelConfig(depth=depth, stride_on=stride_on, zero_init_residual=zero_init)  # type: ignore[arg-type]
    return ResNet(cfg, num_classes=1000)


@pytest.mark.parametrize("depth", PARAMETERS)
def test_parameter_counts(depth: int) -> None:
    with torch.device("meta"):
        model = network(depth)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[depth]


@pytest.mark.parametrize("depth", ARCHITECTURES)
def test_outputs_equal_torchvisions_bitwise(depth: int) -> None:
    """Same names, same weights, same fp32 outputs to the last bit: forward, and BN statistics of a training pass."""
    torch.manual_seed(1)
    theirs = torchvision.models.get_model(f"resnet{depth}", weights=None)
    ours = network(depth)
    load_weights(ours, theirs.state_dict())
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(ours(images), theirs(images))
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name
    with torch.inference_mode():
        assert torch.equal(ours.eval()(images), theirs.eval()(images))


def test_v1_strides_on_the_1x1_and_v15_on_the_3x3() -> None:
    with torch.device("meta"):
        v1, v15 = network(50, "1x1"), network(50, "3x3")
    for model, conv1, conv2 in [(v1, (2, 2), (1, 1)), (v15, (1, 1), (2, 2))]:
        assert model.layer2[0].conv1.stride == conv1
        assert model.layer2[0].conv2.stride == conv2
    assert sum(p.numel() for p in v1.parameters()) == PARAMETERS[50]


@pytest.mark.parametrize("depth", [18, 50])
def test_zero_init_makes_blocks_the_identity(depth: int) -> None:
    block = network(depth, zero_init=True).layer1[-1].eval()
    x = torch.rand(1, {18: 64, 50: 256}[depth], 8, 8)  # not negative, as after a ReLU
    assert torch.equal(block(x), x)
    assert not torch.equal(network(depth, zero_init=False).layer1[-1].eval()(x), x)


def test_uint8_pixels_are_normalised_inside() -> None:
    model = network(18).eval()
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    mean, std = torch.tensor(PIXEL_MEAN).view(1, 3, 1, 1), torch.tensor(PIXEL_STD).view(1, 3, 1, 1)
    assert torch.equal(model(pixels), model((pixels - mean) / std))
    assert "pixel_mean" not in model.state_dict()


def test_weights_of_another_depth_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"layer3\.10\.bn1\.bias is only in the saved weights"):
        load_weights(network(50), network(101).state_dict())
    other = network(18).state_dict() | {"fc.weight": torch.zeros(10, 512)}
    with pytest.raises(
        ValueError, match=r"fc\.weight is \(10, 512\) in the saved weights and \(1000, 512\) in the model"
    ):
        load_weights(network(18), other)
