"""mixup and CutMix: the written-out formulas, in whole numbers, the same bits for every share of a batch."""

import numpy as np
import pytest
import torch

from pipeline.data import augment_params, stream
from pipeline.data.augment_params import MIX_ONE
from pipeline.data.loading.mix import mix
from pipeline.data.stream import IntArray, Purpose

SIZE, BATCH, CLASSES = 32, 64, 5


@pytest.fixture
def images() -> torch.Tensor:
    torch.manual_seed(0)
    pixels = torch.randint(0, 256, (BATCH, 3, SIZE, SIZE), dtype=torch.uint8)
    return pixels.contiguous(memory_format=torch.channels_last)


LABELS = torch.arange(BATCH) % CLASSES


def mixture(mixup: float, cutmix: float) -> tuple[IntArray, IntArray]:
    return augment_params.mixtures(mixup, cutmix, SIZE, stream.uniforms(Purpose.MIX, 0, 0, 0, BATCH // 2, 4))


def test_mixup_is_the_weighted_mean_of_pairs(images: torch.Tensor) -> None:
    weights, boxes = mixture(0.8, 0.0)
    mixed, shares = mix(images, LABELS, weights, boxes, CLASSES)
    for i in range(BATCH):
        own, partner = float(weights[i // 2]) / MIX_ONE, i ^ 1
        expected = own * images[i].double() + (1 - own) * images[partner].double()
        assert (mixed[i].double() - expected).abs().max() <= 0.5 + 1e-9  # rounded to the nearest
        wanted = torch.zeros(CLASSES).index_add(0, LABELS[[i, partner]], torch.tensor([own, 1 - own]))
        assert torch.allclose(shares[i], wanted, atol=1e-6)


def test_cutmix_pastes_the_partners_box_and_shares_by_area(images: torch.Tensor) -> None:
    weights, boxes = mixture(0.0, 1.0)
    mixed, shares = mix(images, LABELS, weights, boxes, CLASSES)
    for i in range(BATCH):
        top, left, bottom, right = boxes[i // 2].tolist()
        expected = images[i].clone()
        expected[:, top:bottom, left:right] = images[i ^ 1, :, top:bottom, left:right]
        assert torch.equal(mixed[i], expected)
        area = (bottom - top) * (right - left) / SIZE**2
        assert shares[i, LABELS[i ^ 1]] == pytest.approx(area, abs=1e-6)
    assert torch.allclose(shares.sum(1), torch.ones(BATCH))


def test_a_share_of_the_batch_is_mixed_as_in_the_whole(images: torch.Tensor) -> None:
    weights, boxes = mixture(0.2, 1.0)
    mixed, shares = mix(images, LABELS, weights, boxes, CLASSES)
    assert mixed.dtype == torch.uint8
    assert mixed.is_contiguous(memory_format=torch.channels_last)
    for start, stop in ((0, 22), (22, 44), (44, 64)):
        pairs = slice(start // 2, stop // 2)
        part, part_shares = mix(images[start:stop], LABELS[start:stop], weights[pairs], boxes[pairs], CLASSES)
        assert torch.equal(part, mixed[start:stop])
        assert torch.equal(part_shares, shares[start:stop])


def test_nothing_is_mixed_at_weight_one(images: torch.Tensor) -> None:
    weights, boxes = np.full(BATCH // 2, MIX_ONE), np.zeros((BATCH // 2, 4), dtype=np.int64)
    mixed, shares = mix(images, LABELS, weights, boxes, CLASSES)
    assert torch.equal(mixed, images)
    assert torch.equal(shares.argmax(1), LABELS)
