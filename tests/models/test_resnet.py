"""The network against torchvision's, timm's and the paper's."""

from typing import Any

import pytest
import timm
import torch
import torchvision
from torch.nn import functional as F

from pipeline.bench.planning.cost_model import count_network
from pipeline.config.training import ModelConfig
from pipeline.models.resnet import ARCHITECTURES, PARTS, PIXEL_MEAN, PIXEL_STD, ResNet, drop_rates
from pipeline.models.state_dict import load_weights

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


@pytest.mark.parametrize("depth", PARAMETERS)
def test_multiply_adds_are_the_published_ones(depth: int) -> None:
    """torchvision's figure, in 1e9 at 224 pixels; the paper's table 1 has 1.8, 3.6, 3.8 (v1), 7.6 (v1), 11.3 (v1)."""
    published = torchvision.models.get_model_weights(f"resnet{depth}")["IMAGENET1K_V1"].meta["_ops"]
    counted = count_network(ModelConfig(depth=depth), 224)  # type: ignore[arg-type]
    assert counted.macs / 1e9 == pytest.approx(published, abs=0.001)
    v1 = count_network(ModelConfig(depth=depth, stride_on="1x1"), 224)  # type: ignore[arg-type]
    assert round(v1.macs / 1e9, 1) == pytest.approx({18: 1.8, 34: 3.6, 50: 3.8, 101: 7.6, 152: 11.3}[depth], abs=0.11)


@pytest.mark.parametrize(("depth", "millions"), [(50, 25.6), (152, 60.2)])
def test_variant_d_is_timms(depth: int, millions: float) -> None:
    """Its names, its outputs, and the parameters that its results tables give."""
    torch.manual_seed(1)
    theirs = timm.create_model(f"resnet{depth}d", pretrained=False).eval()
    ours = ResNet(ModelConfig(depth=depth, variant="d"), 1000).eval()  # type: ignore[arg-type]
    load_weights(ours, theirs.state_dict())
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(ours(images), theirs(images), rtol=0, atol=1e-5)
    assert round(sum(p.numel() for p in ours.parameters()) / 1e6, 1) == millions


def test_a_dropped_branch_leaves_the_shortcut_and_a_kept_one_is_scaled() -> None:
    block: Any = network(50).layer1[-1].train()
    x = torch.rand(3, 256, 8, 8)
    whole = block(x) - x
    dropped = block(x, torch.tensor([0.0, 1.0, 2.0]))
    assert torch.equal(dropped[0], x[0])
    branch = block.bn3(block.conv3(F.relu(block.bn2(block.conv2(F.relu(block.bn1(block.conv1(x))))))))
    torch.testing.assert_close(dropped[2], F.relu(x[2] + 2 * branch[2]))
    assert not torch.equal(whole[2], torch.zeros_like(whole[2]))


def test_drop_rates_rise_linearly_to_the_last_block() -> None:
    rates = drop_rates(ModelConfig(depth=152, drop_path=0.05))
    assert len(rates) == 50 == len(network(152).blocks)
    assert (rates[0], rates[-1]) == (0.0, 0.05)
    assert rates[7] == pytest.approx(0.05 * 7 / 49)
    assert drop_rates(ModelConfig()) == []


@pytest.mark.parametrize("frozen", ["none", "layer1"])
def test_recomputed_activations_change_nothing_but_memory(frozen: str) -> None:
    """Gradients and BatchNorms' statistics to the last bit, also with dropped branches; and less is kept."""
    images, keep = torch.rand(4, 3, 64, 64), (torch.rand(4, 8) > 0.3).float()
    results, kept = [], []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = ResNet(ModelConfig(depth=18, activation_checkpointing=recompute, freeze=frozen), 10).train()  # type: ignore[arg-type]
        sizes: list[int] = []

        def pack(x: torch.Tensor, sizes: list[int] = sizes) -> torch.Tensor:
            sizes.append(x.numel())
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            loss = model(images, keep).square().mean()
        kept.append(sum(sizes))
        loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        results.append(gradients | dict(model.named_buffers()))
    assert results[0].keys() == results[1].keys()
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]), name
    assert kept[1] < 0.5 * kept[0]


def test_frozen_parts_stay_as_they_are() -> None:
    torch.manual_seed(0)
    model = ResNet(ModelConfig(depth=18, freeze="layer2"), 10).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(torch.rand(4, 3, 64, 64)).square().mean().backward()
    optimizer.step()
    changed = {
        name.partition(".")[0] for name, value in model.state_dict().items() if not torch.equal(value, before[name])
    }
    assert changed == {"layer3", "layer4", "fc"}
    assert {name.partition(".")[0] for name in before} == {module for part in PARTS.values() for module in part}
