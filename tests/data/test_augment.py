"""What DALI does to images, against torchvision's functions of the same names."""

import math
from collections.abc import Callable
from contextlib import closing

import numpy as np
import pytest
import torch
from odd_images import encode, picture
from ranks import no_bad_image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as TF

from pipeline.config.data import DataConfig
from pipeline.data.augment_params import NUM_BINS, OPERATIONS
from pipeline.data.batch_spec import BatchSpec
from pipeline.data.index import Index
from pipeline.data.indexing.build import build_index
from pipeline.data.loading.augment import FILL
from pipeline.data.loading.bad_images import BadImages
from pipeline.data.loading.dali import DaliPipeline
from pipeline.data.loading.fetch import MEAN_COLOUR, BatchReader

CPU = torch.device("cpu")
SIZE, BATCH = 96, 4
BIN = 20
STRENGTH = BIN / (NUM_BINS["trivial"] - 1)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    root = tmp_path_factory.mktemp("pictures")
    for i in range(BATCH):
        file = root / "a" / f"{i}.png"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(encode(picture(SIZE, SIZE, seed=i), "PNG"))
    return build_index(root)[0]


def decode(index: Index, cfg: DataConfig, **changes: object) -> tuple[Tensor, Tensor]:
    """The images as they are, and as `changes` have them."""
    zero, whole = np.zeros((BATCH, 2), dtype=np.int64), np.full((BATCH, 2), SIZE)
    draws = {name: np.array([values] * BATCH, dtype=np.float32) for name, values in changes.items() if name != "ops"}
    if "ops" in changes:
        draws["ops"] = np.array([changes["ops"]] * BATCH, dtype=np.int32)
    plain, augmented = (
        BatchSpec(np.arange(BATCH), zero[:, 0], SIZE, zero, whole, np.zeros(BATCH, dtype=np.bool_), d)
        for d in ({}, draws)
    )

    def pixels(spec: BatchSpec) -> Tensor:
        pipeline = DaliPipeline(cfg, BATCH, 1, CPU, BadImages(index, 0.1, no_bad_image), list(spec.draws))
        with closing(BatchReader(index, cfg, no_warning, 1.0)) as reader, closing(pipeline):
            batch = reader.read(spec, lambda size: memoryview(bytearray(size)))
            ((_, images),) = pipeline.decode(iter([batch]))
            return images.clone()

    return pixels(plain), pixels(augmented)


def no_warning(text: str) -> None:
    raise AssertionError(text)


def cfg(policy: str = "none", **settings: object) -> DataConfig:
    return DataConfig(train="-", val="-", auto_augment=policy, **settings)  # type: ignore[arg-type]


def affine(image: Tensor, *, move: tuple[int, int] = (0, 0), shear: tuple[float, float] = (0.0, 0.0)) -> Tensor:
    degrees = [math.degrees(math.atan(s)) for s in shear]
    fill = [float(FILL)] * 3
    moved: Tensor = TF.affine(image, 0, list(move), 1, degrees, InterpolationMode.BILINEAR, fill, center=[0, 0])
    return moved


def enhanced(sign: int) -> float:
    return 1 + sign * (0.01 + 0.98 * STRENGTH)


# Operation -> torchvision's version with a sign, and the mean difference that is allowed, of 255.
Reference = tuple[Callable[[Tensor, int], Tensor], float]
REFERENCES: dict[str, Reference] = {
    # torchvision moves by whole pixels
    "translate_x": (lambda x, s: affine(x, move=(int(s * 32 * STRENGTH), 0)), 3.0),
    "translate_y": (lambda x, s: affine(x, move=(0, int(s * 32 * STRENGTH))), 3.0),
    # the other way round, which is as likely
    "shear_x": (lambda x, s: affine(x, shear=(-s * 0.99 * STRENGTH, 0)), 0.5),
    "shear_y": (lambda x, s: affine(x, shear=(0, -s * 0.99 * STRENGTH)), 0.5),
    "rotate": (
        lambda x, s: TF.rotate(x, s * 135 * STRENGTH, InterpolationMode.BILINEAR, fill=[float(FILL)] * 3),
        0.5,
    ),
    "brightness": (lambda x, s: TF.adjust_brightness(x, enhanced(s)), 1.0),
    "contrast": (lambda x, s: TF.adjust_contrast(x, enhanced(s)), 1.0),
    "color": (lambda x, s: TF.adjust_saturation(x, enhanced(s)), 1.0),
    "sharpness": (lambda x, s: TF.adjust_sharpness(x, enhanced(s)), 1.0),  # but for the border
    "posterize": (lambda x, s: TF.posterize(x, round(8 - 6 * STRENGTH)), 0.0),
    "solarize": (lambda x, s: TF.solarize(x, 256 - 256 * STRENGTH), 0.0),
    "equalize": (lambda x, s: TF.equalize(x), 5.0),  # OpenCV's formula, not PIL's
    "auto_contrast": (lambda x, s: TF.autocontrast(x), 1.0),
    "identity": (lambda x, s: x, 0.0),
}


@pytest.mark.parametrize("name", OPERATIONS["trivial"])
def test_operations_are_torchvisions(index: Index, name: str) -> None:
    reference, allowed = REFERENCES[name]
    for sign in (1, -1):
        ops = [[OPERATIONS["trivial"].index(name), BIN, int(sign < 0)]]
        plain, changed = decode(index, cfg("trivial"), ops=ops)
        gap = (changed.int() - reference(plain, sign).int()).abs().float().mean()
        assert gap <= allowed, (name, sign, gap)
        assert name == "identity" or not torch.equal(plain, changed)


def test_rand_augment_applies_its_operations_in_a_row(index: Index) -> None:
    names = OPERATIONS["rand"]
    ops = [[names.index("posterize"), 30, 0], [names.index("solarize"), 15, 0]]
    plain, changed = decode(index, cfg("rand"), ops=ops)
    assert torch.equal(changed, TF.solarize(TF.posterize(plain, 4), 128))


def test_auto_augment_has_operations_of_its_own(index: Index) -> None:
    names = OPERATIONS["auto"]
    plain, changed = decode(
        index, cfg("auto"), ops=[[names.index("invert"), 0, 0], [names.index("solarize_add"), 5, 0]]
    )
    inverted = 255 - plain
    assert torch.equal(changed, torch.where(inverted < 128, inverted + 55, inverted))


def test_jitter_changes_brightness_contrast_and_saturation_as_torchvision(index: Index) -> None:
    plain, brighter = decode(index, cfg(), jitter=[1.3, 1.0, 1.0, 0.0])
    assert (brighter.int() - TF.adjust_brightness(plain, 1.3).int()).abs().max() <= 1
    plain, grey = decode(index, cfg(), jitter=[1.0, 1.0, 0.0, 0.0])
    assert (grey.int() - TF.adjust_saturation(plain, 0.0).int()).abs().max() <= 2
    plain, flat = decode(index, cfg(), jitter=[1.0, 0.5, 1.0, 0.0])
    assert (flat.float() - (plain.float() * 0.5 + 64)).abs().max() <= 1  # about mid-grey, not the image's mean
    plain, turned = decode(index, cfg(), jitter=[1.0, 1.0, 1.0, 120.0])
    assert (turned.float().mean((0, 2, 3)) - plain.float().mean((0, 2, 3))).abs().max() > 2


def test_erasing_fills_its_rectangle_with_the_mean_colour(index: Index) -> None:
    plain, erased = decode(index, cfg(), erase=[10, 20, 30, 40])
    expected = plain.clone()
    expected[:, :, 10:40, 20:60] = torch.tensor(MEAN_COLOUR, dtype=torch.uint8).view(3, 1, 1)
    assert torch.equal(erased, expected)
    plain, untouched = decode(index, cfg(), erase=[10, 20, 0, 0])
    assert torch.equal(untouched, plain)
