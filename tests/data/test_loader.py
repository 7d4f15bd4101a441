"""The loaders: global batches that do not depend on ranks or resumes, pixels, and broken images."""

import dataclasses
import shutil
import tarfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from nvidia.dali import fn, pipeline_def, types
from odd_images import damaged_jpeg, encode, picture, write_odd_folder
from PIL import Image, ImageOps
from pyarrow import parquet
from ranks import no_bad_image
from s3 import s3_storage
from torchvision.transforms.v2 import functional as TF
from web import web_server

from pipeline.config.data import DataConfig
from pipeline.data.index import Index, load_index
from pipeline.data.indexing.build import build_index
from pipeline.data.loading.bad_images import BadDataError
from pipeline.data.loading.fetch import MEAN_COLOUR
from pipeline.data.loading.loader import EvalLoader, LoaderContext, TrainLoader
from pipeline.data.loading.read import StorageAwayError

CPU = torch.device("cpu")
SMALL = DataConfig(train="-", val="-", image_size=32, val_resize=32, crop_scale=(0.3, 1.0))


def loader(index: Index, rank: int = 0, world_size: int = 1, cfg: DataConfig = SMALL, batch: int = 50) -> TrainLoader:
    return TrainLoader(index, cfg, LoaderContext(rank, world_size, CPU, 1), no_bad_image, global_batch=batch, seed=3)


Step = tuple[list[int], torch.Tensor, torch.Tensor]


def global_batches(index: Index, world_size: int, start: int, stop: int, cfg: DataConfig = SMALL) -> list[Step]:
    """(rows, pixels, labels) of global batches [start, stop), put together from all ranks."""
    ranks = [loader(index, rank, world_size, cfg).from_step(start, stop) for rank in range(world_size)]
    return [
        (
            [int(row) for part in parts for row in part.rows],
            torch.cat([part.images for part in parts]),
            torch.cat([part.labels for part in parts]),
        )
        for parts in zip(*ranks, strict=True)
    ]


def assert_same(a: list[Step], b: list[Step]) -> None:
    assert len(a) == len(b)
    for (rows, pixels, labels), (other_rows, other_pixels, other_labels) in zip(a, b, strict=True):
        assert rows == other_rows
        assert torch.equal(pixels, other_pixels)
        assert torch.equal(labels, other_labels)


@pytest.fixture(scope="module")
def index(digits_index: Callable[[str], Path]) -> Index:
    return load_index(digits_index("train"))


@pytest.fixture(scope="module")
def undisturbed(index: Index) -> list[Step]:
    """The first 20 global batches as one rank sees them; 50 images each, which 3 and 4 ranks do not divide."""
    return global_batches(index, 1, 0, 20)


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_batches_do_not_depend_on_the_world_size(index: Index, undisturbed: list[Step], world_size: int) -> None:
    assert_same(global_batches(index, world_size, 0, 20), undisturbed)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_batches_after_a_resume_with_other_ranks(index: Index, undisturbed: list[Step], world_size: int) -> None:
    assert_same(global_batches(index, world_size, 10, 20), undisturbed[10:])


def test_batches_continue_into_the_next_epoch(index: Index) -> None:
    per_epoch = len(index) // 50
    across = global_batches(index, 2, per_epoch - 1, per_epoch + 1)
    assert_same(across[1:], global_batches(index, 1, per_epoch, per_epoch + 1))
    assert across[1][0] != global_batches(index, 1, 0, 1)[0][0]


def test_threads_and_prefetch_do_not_change_pixels(index: Index, undisturbed: list[Step]) -> None:
    cfg = DataConfig(
        train="-", val="-", image_size=32, val_resize=32, crop_scale=(0.3, 1.0), prefetch=7, read_threads=1
    )
    many = TrainLoader(index, cfg, LoaderContext(0, 1, CPU, 3), no_bad_image, global_batch=50, seed=3)
    assert_same([(b.rows.tolist(), b.images, b.labels) for b in many.from_step(0, 20)], undisturbed)


def test_batches_are_uint8_channels_last_with_their_labels(index: Index) -> None:
    batch = next(loader(index).from_step(0, 1))
    assert batch.images.dtype == torch.uint8
    assert batch.images.shape == (50, 3, 32, 32)
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert batch.labels.tolist() == [int(index.path(row).split("/")[0]) for row in batch.rows]


# Each with draws of its own; an epoch has 28 steps, so that steps 22 to 33 lie in two of them.
RECIPES = {
    "everything": {
        "auto_augment": "trivial",
        "jitter": (0.4, 0.4, 0.4, 0.1),
        "erase": 0.5,
        "mixup": 0.2,
        "cutmix": 1.0,
        "repeated_aug": 2,
        "start_size": 24,
        "grow_epochs": (0, 1),
    },
    "RandAugment": {"auto_augment": "rand", "rand_ops": 3, "erase": 0.3},
    "AutoAugment in blocks": {"auto_augment": "auto", "shuffle_block": 16, "shuffle_window": 4},
}


SLOW = {"RandAugment", "AutoAugment in blocks"}


@pytest.mark.parametrize(
    "recipe", [pytest.param(r, marks=[pytest.mark.e2e, pytest.mark.thorough] if r in SLOW else ()) for r in RECIPES]
)
def test_augmented_batches_do_not_depend_on_the_world_size_or_on_resumes(index: Index, recipe: str) -> None:
    cfg = dataclasses.replace(SMALL, **RECIPES[recipe])  # type: ignore[arg-type]
    undisturbed = global_batches(index, 1, 22, 34, cfg)
    for world_size in (2, 3, 4):
        assert_same(global_batches(index, world_size, 22, 34, cfg), undisturbed)
    assert_same(global_batches(index, 3, 25, 34, cfg), undisturbed[3:])
    plain = global_batches(index, 1, 30, 31, SMALL)[0]
    assert not torch.equal(undisturbed[8][1], plain[1])


def test_dropped_branches_do_not_depend_on_the_world_size_or_on_resumes(index: Index) -> None:
    """Stochastic depth's draws belong to the stream: the same image skips the same blocks."""

    def kept(rank: int, world_size: int, start: int) -> list[torch.Tensor]:
        rates = [0.0, 0.1, 0.5]
        context = LoaderContext(rank, world_size, CPU, 1)
        loader = TrainLoader(index, SMALL, context, no_bad_image, global_batch=50, seed=3, drop_rates=rates)
        return [batch.drop_path_mask for batch in loader.from_step(start, 30) if batch.drop_path_mask is not None]

    undisturbed = kept(0, 1, 26)  # into the second epoch
    shares = zip(*(kept(rank, 3, 27) for rank in range(3)), strict=True)
    for whole, parts in zip(undisturbed[1:], shares, strict=True):
        assert torch.equal(torch.cat(parts), whole)
    values = torch.cat(undisturbed)
    assert values.shape == (200, 3)
    assert (values[:, 0] == 1).all()
    assert set(values[:, 2].tolist()) == {0.0, 2.0}
    assert (values[:, 2] == 0).float().mean() == pytest.approx(0.5, abs=0.1)
    assert not torch.equal(undisturbed[0], undisturbed[1])


def test_the_papers_scale_augmentation_is_part_of_the_stream(index: Index) -> None:
    cfg = dataclasses.replace(SMALL, crop_short=(32, 60))
    undisturbed = global_batches(index, 1, 0, 3, cfg)
    assert_same(global_batches(index, 2, 1, 3, cfg), undisturbed[1:])
    assert not torch.equal(undisturbed[0][1], global_batches(index, 1, 0, 1)[0][1])


def test_the_size_grows_with_the_epoch(index: Index) -> None:
    cfg = dataclasses.replace(SMALL, **RECIPES["everything"])  # type: ignore[arg-type]
    # From step 25, so that two steps that would be decoded together are of two sizes.
    assert [batch[1].shape[2:] for batch in global_batches(index, 2, 25, 30, cfg)] == [(24, 24)] * 3 + [(32, 32)] * 2


SOURCES = ["tar", "parquet", "s3"]


@pytest.fixture(scope="module")
def sources(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[Index, DataConfig]]]:
    """The digits in other forms, in the order of the folder's rows."""
    root = tmp_path_factory.mktemp("sources")
    files = sorted((digits / "train").glob("*/*.jpg"))
    thirds = [files[i * len(files) // 3 : (i + 1) * len(files) // 3] for i in range(3)]
    for number, third in enumerate(thirds):
        for folder in ("tar", "parquet"):
            (root / folder).mkdir(exist_ok=True)
        with tarfile.open(root / "tar" / f"{number}.tar", "w") as tar:
            for file in third:
                tar.add(file, f"{file.parent.name}/{file.name}")
        images = [{"bytes": file.read_bytes(), "path": file.name} for file in third]
        table = pa.table({"image": images, "label": [file.parent.name for file in third]})
        parquet.write_table(table, root / "parquet" / f"{number}.parquet", row_group_size=100)
    with s3_storage() as storage:
        for number in range(3):
            (storage / "shards").upload(root / "tar" / f"{number}.tar", f"{number}.tar")
        cached = dataclasses.replace(SMALL, cache_dir=str(root / "cache"))
        yield {
            "tar": (build_index(root / "tar")[0], SMALL),
            "parquet": (build_index(root / "parquet")[0], SMALL),
            "s3": (build_index((storage / "shards").uri)[0], cached),
        }


@pytest.mark.parametrize("source", SOURCES)
def test_batches_do_not_depend_on_the_source(
    sources: dict[str, tuple[Index, DataConfig]], undisturbed: list[Step], source: str
) -> None:
    index, cfg = sources[source]
    for world_size in (1, 2, 3, 4):
        assert_same(global_batches(index, world_size, 0, 8, cfg), undisturbed[:8])
    assert_same(global_batches(index, 3, 10, 20, cfg), undisturbed[10:])


def file(index: Index, row: int) -> Path:
    assert index.root is not None
    assert index.root.local is not None
    return index.root.local / index.file(row)


@pytest.fixture
def pictures(tmp_path: Path) -> Index:
    """JPEGs of many sizes."""
    for i, (height, width) in enumerate([(375, 500), (500, 375), (64, 64), (90, 700), (333, 257), (48, 36)]):
        file = tmp_path / "a" / f"{i}.jpg"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(encode(picture(height, width, seed=i), "JPEG", quality=95))
    return build_index(tmp_path)[0]


def test_pixels_equal_a_reference_decode_crop_resize_flip(pictures: Index) -> None:
    """Bitwise PIL's decode of the whole image, and torchvision's crop and antialiased bilinear resize of it."""
    cfg = DataConfig(train="-", val="-", image_size=96, val_resize=96, crop_scale=(0.08, 1.0))
    train = loader(pictures, cfg=cfg, batch=6)
    flipped = 0
    for step, batch in enumerate(train.from_step(0, 20)):
        spec = train.batch_spec(step)
        for image, row, (y, x), (h, w), flip in zip(
            batch.images, spec.rows, spec.anchors, spec.shapes, spec.flips, strict=True
        ):
            whole = TF.pil_to_tensor(Image.open(file(pictures, row)))
            expected = TF.resize(whole[:, y : y + h, x : x + w], [96, 96], antialias=True)
            expected = TF.horizontal_flip(expected) if flip else expected
            flipped += int(flip)
            assert torch.equal(image, expected)
    assert 30 < flipped < 90


def test_a_gpus_resize_is_within_its_tolerance_of_the_cpus(pictures: Index) -> None:
    """DALI's resize, which a GPU takes: the same triangular filter, with float weights and one rounding.

    torch's weights are 16-bit whole numbers, and it rounds between its two passes: at most 2 of 255 apart.
    """
    cfg = DataConfig(train="-", val="-", image_size=96, val_resize=96)
    spec = loader(pictures, cfg=cfg, batch=6).batch_spec(0)
    (batch,) = loader(pictures, cfg=cfg, batch=6).from_step(0, 1)

    @pipeline_def(batch_size=1, num_threads=1, device_id=None)  # type: ignore[untyped-decorator]
    def resize(crop: np.ndarray) -> Any:
        return fn.resize(types.Constant(crop, layout="HWC"), size=(96, 96), antialias=True)

    for i, row in enumerate(spec.rows.tolist()):
        (y, x), (h, w) = spec.anchors[i], spec.shapes[i]
        crop = np.asarray(Image.open(file(pictures, row)))[y : y + h, x : x + w]
        (resized,) = resize(crop).run()
        expected = torch.from_numpy(np.array(resized.at(0))).permute(2, 0, 1)
        expected = expected.flip(2) if spec.flips[i] else expected
        gap = (batch.images[i].int() - expected.int()).abs()
        assert gap.max() <= 2
        assert gap.float().mean() < 0.3


def test_evaluation_crops_are_resize_then_centre_crop(pictures: Index) -> None:
    """Resizing the central square is resizing the whole and cutting the centre out, to within rounding the square."""
    cfg = DataConfig(train="-", val="-", image_size=112, val_resize=128)
    (_, batch), *rest = EvalLoader(pictures, cfg, LoaderContext(0, 1, CPU, 1), no_bad_image, batch=6)
    assert not rest
    for image, row in zip(batch.images, batch.rows, strict=True):
        whole = TF.pil_to_tensor(Image.open(file(pictures, row)))
        expected = TF.center_crop(TF.resize(whole, [128], antialias=True), [112])
        assert (image.int() - expected.int()).abs().float().mean() < 4


def test_ten_crops_are_those_of_the_resized_image(pictures: Index) -> None:
    """As torchvision cuts them, to within rounding the square; in any order, since they are averaged."""
    cfg = DataConfig(train="-", val="-", image_size=112, val_resize=128)
    loader = EvalLoader(pictures, cfg, LoaderContext(0, 1, CPU, 1), no_bad_image, batch=6, views="ten")
    ((_, batch),) = loader
    views = loader.views(batch.images)
    assert [len(view) for view in views] == [6] * 10
    for i, row in enumerate(batch.rows):
        whole = TF.resize(TF.pil_to_tensor(Image.open(file(pictures, row))), [128], antialias=True)
        for expected in TF.ten_crop(whole, [112]):
            gaps = [(view[i].int() - expected.int()).abs().float().mean().item() for view in views]
            assert min(gaps) < 6  # another place is 40 or more away


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_sees_every_row_once(digits_index: Callable[[str], Path], world_size: int) -> None:
    index = load_index(digits_index("val"))
    chunks = {
        chunk: batch.rows.tolist()
        for rank in range(world_size)
        for chunk, batch in EvalLoader(index, SMALL, LoaderContext(rank, world_size, CPU, 1), no_bad_image, batch=128)
    }
    assert {chunk: len(rows) for chunk, rows in chunks.items()} == {0: 128, 1: 128, 2: 104}
    assert [row for chunk in sorted(chunks) for row in chunks[chunk]] == list(range(360))


def test_odd_images_decode(tmp_path: Path) -> None:
    """CMYK, 16 bit, grey, alpha, palette, one pixel: each as PIL shows it in RGB."""
    write_odd_folder(tmp_path)
    index, _ = build_index(tmp_path)
    cfg = DataConfig(train="-", val="-", image_size=48, val_resize=48)
    ((_, batch),) = EvalLoader(index, cfg, LoaderContext(0, 1, CPU, 1), no_bad_image, batch=100)
    for image, row in zip(batch.images, batch.rows, strict=True):
        opened: Image.Image = Image.open(file(index, row))
        if opened.mode.startswith("I"):  # PIL clips 16 bits where DALI scales them
            opened = Image.fromarray((np.asarray(opened) / 257).astype(np.uint8))
        whole = TF.pil_to_tensor(opened.convert("RGB"))
        side = min(whole.shape[1:])
        expected = TF.resize(TF.center_crop(whole, [side, side]), [48, 48], antialias=True)
        assert (image.int() - expected.int()).abs().float().mean() < 2, index.path(int(row))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_crops_of_rotated_photographs_are_those_of_the_upright_picture(tmp_path: Path, orientation: int) -> None:
    (tmp_path / "a").mkdir()
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture(64, 96).save(tmp_path / "a" / "0.jpg", exif=exif, quality=95)
    index, report = build_index(tmp_path)
    assert report.exif_rotated == ([0] if orientation > 1 else [])
    train = loader(index, batch=1)
    upright = TF.pil_to_tensor(ImageOps.exif_transpose(Image.open(tmp_path / "a" / "0.jpg")))
    for step, batch in enumerate(train.from_step(0, 10)):
        spec = train.batch_spec(step)
        (y, x), (h, w) = spec.anchors[0], spec.shapes[0]
        expected = TF.resize(upright[:, y : y + h, x : x + w], [32, 32], antialias=True)
        expected = TF.horizontal_flip(expected) if spec.flips[0] else expected
        assert torch.equal(batch.images[0], expected)


@pytest.fixture
def partly_broken(tmp_path: Path) -> Path:
    """40 images, of which 3, 17 and 18 turn out to be broken when decoded."""
    for i in range(40):
        file = tmp_path / "a" / f"{i:02d}.jpg"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(damaged_jpeg() if i in (3, 17, 18) else encode(picture(seed=i), "JPEG"))
    return tmp_path


def test_broken_images_are_replaced_and_named_once(partly_broken: Path) -> None:
    index, report = build_index(partly_broken)
    assert report.refused == []
    cfg = DataConfig(train="-", val="-", image_size=32, val_resize=32, max_bad_fraction=0.1)
    named: list[str] = []
    train = TrainLoader(
        index, cfg, LoaderContext(0, 1, CPU, 1), lambda path, _: named.append(path), global_batch=10, seed=0
    )
    batches = list(train.from_step(0, 12))  # three epochs
    assert sorted(Path(path).stem for path in named) == ["03", "17", "18"]
    stand_in = torch.tensor(MEAN_COLOUR, dtype=torch.uint8).view(3, 1, 1)
    for batch in batches:
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        for image, row in zip(batch.images, batch.rows, strict=True):
            assert bool((image == stand_in).all()) == (row in (3, 17, 18))
    healthy = [b for b in batches if not set(b.rows.tolist()) & {3, 17, 18}]
    assert healthy
    again = TrainLoader(index, cfg, LoaderContext(0, 1, CPU, 1), lambda *_: None, global_batch=10, seed=0)
    for one, other in zip(batches, again.from_step(0, 12), strict=True):
        assert torch.equal(one.images, other.images)


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (
            0.05,
            r"3 of 40 images in .* are broken, .*_fraction=0\.05 allows 2: a/03\.jpg, a/17\.jpg, a/18\.jpg",
        ),
        (0.001, r"2 of 40 images in .* allows 1: "),
        (0.0, r"1 of 40 images in .* data\.max_bad_fraction=0 allows 0: a/\d\d\.jpg; "),
    ],
)
def test_too_many_broken_images_stop_the_run(partly_broken: Path, share: float, text: str) -> None:
    index, _ = build_index(partly_broken)
    cfg = DataConfig(train="-", val="-", image_size=32, val_resize=32, max_bad_fraction=share)
    train = TrainLoader(index, cfg, LoaderContext(0, 1, CPU, 1), lambda *_: None, global_batch=10, seed=0)
    with closing(train), pytest.raises(BadDataError, match=text):
        list(train.from_step(0, 8))


def test_a_storage_that_is_away_is_no_broken_image(digits: Path, tmp_path: Path) -> None:
    """Nothing takes the place of images of which nothing is known: the run ends, to be recovered."""
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.add(digits / "val", "val")
    with web_server(tmp_path) as server:
        index, _ = build_index(f"{server.storage}/x.tar")
    cfg = dataclasses.replace(SMALL, cache_dir=str(tmp_path / "cache"))
    context = LoaderContext(0, 1, CPU, 1, retry_timeout_s=1.0)
    train = TrainLoader(index, cfg, context, no_bad_image, global_batch=10, seed=0)
    with closing(train), pytest.raises(StorageAwayError, match=r"x\.tar#val/\d/.*\.jpg: "):
        list(train.from_step(0, 8))


@pytest.mark.parametrize("left", ["nothing", "an empty folder"])
def test_data_that_vanishes_is_no_broken_image(left: str, tmp_path: Path) -> None:
    """A mount that has gone comes back: an attempt ends, and the next one waits for it."""
    folder = tmp_path / "data"
    write_odd_folder(folder)
    index, _ = build_index(folder)
    shutil.rmtree(folder)
    if left == "an empty folder":
        folder.mkdir()
    loader = EvalLoader(index, SMALL, LoaderContext(0, 1, CPU, 1, retry_timeout_s=0.5), no_bad_image, batch=4)
    with closing(loader), pytest.raises(StorageAwayError, match="No such file"):
        list(loader)


def test_a_deleted_file_is_a_broken_image(tmp_path: Path) -> None:
    for i in range(4):
        (tmp_path / "a").mkdir(exist_ok=True)
        (tmp_path / "a" / f"{i}.jpg").write_bytes(encode(picture(), "JPEG"))
    index, _ = build_index(tmp_path)
    (tmp_path / "a" / "2.jpg").unlink()
    reasons: dict[str, str] = {}
    ((_, batch),) = EvalLoader(index, SMALL, LoaderContext(0, 1, CPU, 1), reasons.__setitem__, batch=4)
    assert len(batch.images) == 4
    ((path, reason),) = reasons.items()
    assert path.endswith("a/2.jpg")
    assert "No such file" in reason
