"""From uniform numbers to augmentations: the laws of the literature, checked against those who wrote them down."""

import math

import numpy as np
import pytest
import torch
from nvidia.dali.auto_aug.auto_augment import get_image_net_policy
from torchvision.transforms import ColorJitter, RandomErasing, RandomResizedCrop

from pipeline.config.data import DataConfig
from pipeline.data import augment_params, stream
from pipeline.data.augment_params import AUTO_POLICY, MIX_ONE, OPERATIONS
from pipeline.data.stream import Purpose


def cfg(**settings: object) -> DataConfig:
    return DataConfig(train="-", val="-", **settings)  # type: ignore[arg-type]


def assert_same_law(ours: np.ndarray, theirs: np.ndarray) -> None:
    """Two-sample Kolmogorov-Smirnov for each column, at a level of 1e-6."""
    for mine, other in zip(ours.T, theirs.T, strict=True):
        points = np.unique(np.concatenate([mine, other]))
        gap = np.abs(_cdf(mine, points) - _cdf(other, points)).max()
        assert gap < math.sqrt(-math.log(1e-6 / 2) / len(mine))


def _cdf(values: np.ndarray, points: np.ndarray) -> np.ndarray:
    return np.searchsorted(np.sort(values), points, side="right") / len(values)


@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 375), (32, 32), (40, 900), (900, 40)])
def test_crops_follow_torchvisions_law(height: int, width: int) -> None:
    """Height, width, top and left of 4,000 crops."""
    n, scale, ratio = 4000, (0.08, 1.0), (3 / 4, 4 / 3)
    sizes = np.full((n, 2), (height, width))
    u = stream.uniforms(Purpose.CROP, 0, 0, 0, n, augment_params.CROP_DRAWS)
    anchors, shapes = augment_params.random_resized_crops(sizes, scale, ratio, u)
    assert (anchors >= 0).all()
    assert (shapes >= 1).all()
    assert (anchors + shapes <= [height, width]).all()
    torch.manual_seed(0)
    image = torch.empty(1, height, width)
    theirs = np.array([RandomResizedCrop.get_params(image, list(scale), list(ratio)) for _ in range(n)])
    assert_same_law(np.concatenate([anchors, shapes], axis=1), theirs)


def test_an_image_of_one_pixel_is_cropped_to_itself() -> None:
    u = stream.uniforms(Purpose.CROP, 0, 0, 0, 50, augment_params.CROP_DRAWS)
    sizes = np.ones((50, 2), dtype=np.int64)
    anchors, shapes = augment_params.random_resized_crops(sizes, (0.08, 1.0), (3 / 4, 4 / 3), u)
    assert (anchors == 0).all()
    assert (shapes == 1).all()


def test_crops_of_evaluation_are_square_and_central() -> None:
    anchors, shapes = augment_params.crops_at(np.array([[256, 400], [300, 256]]), 224 / 256)
    assert shapes.tolist() == [[224, 224], [224, 224]]
    assert anchors.tolist() == [[16, 88], [38, 16]]


def test_crops_at_corners_touch_them() -> None:
    for place, expected in {
        (0.0, 0.0): [0, 0],
        (0.0, 1.0): [0, 176],
        (1.0, 0.0): [32, 0],
        (1.0, 1.0): [32, 176],
    }.items():
        anchors, _ = augment_params.crops_at(np.array([[256, 400]]), 224 / 256, place)
        assert anchors.tolist() == [expected]


def test_short_side_crops_are_the_papers() -> None:
    """The short side becomes 256 to 480 pixels, each as likely, and a square of 224 lies anywhere in the image."""
    n = 20_000
    u = stream.uniforms(Purpose.CROP, 0, 0, 0, n, 3)
    anchors, shapes = augment_params.short_side_crops(np.full((n, 2), (900, 600)), 224, (256, 480), u)
    assert (shapes[:, 0] == shapes[:, 1]).all()
    lengths = 600 * 224 / shapes[:, 0]
    assert lengths.min() == pytest.approx(256, abs=0.5)
    assert lengths.max() == pytest.approx(480, abs=1)
    assert np.percentile(lengths, [25, 50, 75]) == pytest.approx([312, 368, 424], abs=3)
    assert (anchors >= 0).all()
    assert (anchors + shapes <= [900, 600]).all()
    room = np.array([900, 600]) - shapes + 1
    assert ((anchors + 0.5) / room).mean(axis=0) == pytest.approx([0.5, 0.5], abs=0.01)


def test_flips_have_their_probability() -> None:
    u = stream.uniforms(Purpose.FLIP, 0, 0, 0, 10_000, 1)
    assert augment_params.flips(0.0, u).sum() == 0
    assert augment_params.flips(1.0, u).sum() == 10_000
    assert abs(augment_params.flips(0.3, u).mean() - 0.3) < 0.02


def test_jitters_follow_torchvisions_law() -> None:
    n, strengths = 4000, (0.4, 1.5, 0.2, 0.1)
    ours = augment_params.jitters(strengths, stream.uniforms(Purpose.JITTER, 0, 0, 0, n, 4))
    torch.manual_seed(0)
    law = ColorJitter(*strengths)
    theirs = np.array(
        [law.get_params(law.brightness, law.contrast, law.saturation, law.hue)[1:] for _ in range(n)], dtype=float
    )
    theirs[:, 3] *= 360
    assert_same_law(ours, theirs)


def test_erasures_follow_torchvisions_law() -> None:
    n, size, scale, ratio = 4000, 64, (0.02, 0.9), (0.3, 3.3)  # the largest rectangles do not fit at first
    u = stream.uniforms(Purpose.ERASE, 0, 0, 0, n, 1 + augment_params.ERASE_DRAWS)
    anchors, shapes = augment_params.erasures(1.0, scale, ratio, size, u)
    assert (anchors >= 0).all()
    assert (anchors + shapes <= size).all()
    torch.manual_seed(0)
    image = torch.zeros(3, size, size)
    theirs = np.array([RandomErasing.get_params(image, scale, ratio, [0.0])[:4] for _ in range(n)])
    drawn = shapes[:, 0] > 0
    assert drawn.mean() > 0.99
    assert_same_law(np.concatenate([anchors, shapes], axis=1)[drawn][:3900], theirs[theirs[:, 2] < size][:3900])


def test_erasures_have_their_probability() -> None:
    u = stream.uniforms(Purpose.ERASE, 0, 0, 0, 10_000, 1 + augment_params.ERASE_DRAWS)
    for probability in (0.0, 0.25, 1.0):
        _, shapes = augment_params.erasures(probability, (0.02, 0.33), (0.3, 3.3), 224, u)
        assert abs((shapes[:, 0] > 0).mean() - probability) < 0.02


def test_mixup_weights_are_beta_distributed() -> None:
    u = stream.uniforms(Purpose.MIX, 0, 0, 0, 10_000, 4)
    for alpha in (0.2, 1.0, 8.0):
        weights, boxes = augment_params.mixtures(alpha, 0.0, 224, u)
        assert (boxes == 0).all()
        theirs = np.rint(np.random.default_rng(0).beta(alpha, alpha, 10_000) * MIX_ONE)
        assert_same_law(weights[:, None], theirs[:, None])


def test_cutmix_boxes_have_the_papers_law() -> None:
    """Side sqrt(1 - lambda) with lambda uniform for alpha 1, centre anywhere, cut at the image's border."""
    size = 1000
    weights, boxes = augment_params.mixtures(0.0, 1.0, size, stream.uniforms(Purpose.MIX, 0, 0, 0, 20_000, 4))
    assert (weights == MIX_ONE).all()
    assert boxes.min() >= 0
    assert boxes.max() <= size
    rng = np.random.default_rng(0)
    side = size * np.sqrt(1 - rng.uniform(size=20_000)) / 2
    centre = rng.uniform(0, size, (2, 20_000))
    theirs = np.clip(np.stack([*(centre - side), *(centre + side)], axis=1), 0, size)
    assert_same_law(boxes, np.rint(theirs))


def test_with_both_on_a_coin_decides_between_mixup_and_cutmix() -> None:
    weights, boxes = augment_params.mixtures(0.2, 1.0, 224, stream.uniforms(Purpose.MIX, 0, 0, 0, 10_000, 4))
    cuts = boxes.any(axis=1)
    assert abs(cuts.mean() - 0.5) < 0.03
    assert (weights[cuts] == MIX_ONE).all()


def test_trivial_augment_draws_operation_strength_and_sign_evenly() -> None:
    u = stream.uniforms(Purpose.AUGMENT, 0, 0, 0, 31_000, 3)
    ops = augment_params.operations(cfg(auto_augment="trivial"), u)
    assert ops.shape == (31_000, 1, 3)
    for column, number in zip(ops[:, 0].T, (14, 31, 2), strict=True):
        counts = np.bincount(column)
        assert len(counts) == number
        expected = 31_000 / number
        assert ((counts - expected) ** 2 / expected).sum() < number + 5 * math.sqrt(2 * number)


def test_rand_augment_takes_its_number_and_its_magnitude() -> None:
    settings = cfg(auto_augment="rand", rand_ops=3, rand_magnitude=7)
    u = stream.uniforms(Purpose.AUGMENT, 0, 0, 0, 14_000, augment_params.num_policy_draws(settings))
    ops = augment_params.operations(settings, u)
    assert ops.shape == (14_000, 3, 3)
    assert (ops[..., 1] == 7).all()
    for k in range(3):
        counts = np.bincount(ops[:, k, 0], minlength=14)
        assert ((counts - 1000) ** 2 / 1000).sum() < 13 + 5 * math.sqrt(26)
    assert abs(np.corrcoef(ops[:, 0, 0], ops[:, 1, 0])[0, 1]) < 0.05


def test_auto_augment_is_the_papers_policy_as_dali_has_it() -> None:
    policy = get_image_net_policy()
    assert augment_params.NUM_BINS["auto"] == policy.num_magnitude_bins
    theirs = [tuple((op.name, p, m or 0) for op, p, m in pair) for pair in policy.sub_policies]
    assert [tuple(op for op in pair if op[0] != "identity") for pair in AUTO_POLICY] == theirs


def test_auto_augment_applies_its_operations_with_their_probabilities() -> None:
    settings, n = cfg(auto_augment="auto"), 50_000
    ops = augment_params.operations(
        settings, stream.uniforms(Purpose.AUGMENT, 0, 0, 0, n, augment_params.num_policy_draws(settings))
    )
    names = np.array(OPERATIONS["auto"])[ops[..., 0]]
    expected: dict[str, float] = dict.fromkeys(OPERATIONS["auto"], 0.0)
    for pair in AUTO_POLICY:
        for name, probability, _ in pair:
            expected[name] += probability / len(AUTO_POLICY)
            expected["identity"] += (1 - probability) / len(AUTO_POLICY)
    for name, rate in expected.items():
        assert abs((names == name).sum() / n - rate) < 0.01, name


def test_sizes_grow_in_few_steps_from_start_to_end() -> None:
    settings = cfg(image_size=224, val_resize=256, start_size=128, grow_epochs=(2, 12))
    sizes = [augment_params.size_at(epoch, settings) for epoch in range(16)]
    assert sizes == sorted(sizes)
    assert sizes[:3] == [128, 128, 128]
    assert sizes[12:] == [224] * 4
    assert {size % 16 for size in sizes} == {0}
    assert [augment_params.size_at(epoch, cfg()) for epoch in (0, 89)] == [224, 224]
    at_once = cfg(start_size=160, grow_epochs=(3, 3))
    assert [augment_params.size_at(epoch, at_once) for epoch in (2, 3)] == [160, 224]
