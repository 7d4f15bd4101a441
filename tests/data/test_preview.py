"""The page of pictures: the batch that the model gets, with its labels."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import ROOT
from odd_images import damaged_jpeg, encode, picture
from PIL import Image
from ranks import no_bad_image

from pipeline.cli import app
from pipeline.config.loading import load
from pipeline.data.indexing.build import build_index
from pipeline.data.loading.loader import LoaderContext, TrainLoader
from pipeline.data.preview import LINE, MARGIN, MIN_CELL

DIGITS = ["data.image_size=32", "data.val_resize=32", "train.global_batch=16", "optim.warmup_epochs=1"]
MIXED = ["data.mixup=0.2", "data.cutmix=1.0", "data.auto_augment=trivial"]
CONFIG = str(ROOT / "configs" / "digits.yaml")


def run(digits: Path, *args: str) -> int:
    return app.main(["preview", CONFIG, f"data.train={digits / 'train'}", f"data.val={digits / 'val'}", *DIGITS, *args])


def test_the_pictures_are_those_of_the_loader(digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "grid.png"
    assert run(digits, *MIXED, "--out", str(out), "--step", "7", "--images", "9", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    cfg = load(CONFIG, [*DIGITS, *MIXED])
    index, _ = build_index(digits / "train")
    loader = TrainLoader(
        index, cfg.data, LoaderContext(0, 1, torch.device("cpu"), 1), no_bad_image, global_batch=16, seed=cfg.run.seed
    )
    (batch,) = loader.from_step(7, 8)
    assert [one["row"] for one in told["images"]] == batch.rows[:9].tolist()
    for one, shares in zip(told["images"], batch.labels, strict=False):
        assert sum(one["labels"].values()) == pytest.approx(1, abs=1e-6)
        assert all(shares[int(name)] == pytest.approx(share) for name, share in one["labels"].items())
    page = np.asarray(Image.open(out))
    assert page.shape[:2] == (3 * (MIN_CELL + MARGIN + 2 * LINE) + MARGIN, 3 * (MIN_CELL + MARGIN) + MARGIN)
    first = page[MARGIN : MARGIN + MIN_CELL : MIN_CELL // 32, MARGIN : MARGIN + MIN_CELL : MIN_CELL // 32]
    assert np.array_equal(first, batch.images[0].permute(1, 2, 0).numpy())


def test_a_broken_image_is_shown_as_the_model_sees_it_and_told(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for i in range(2):
        (tmp_path / "data" / str(i)).mkdir(parents=True)
        (tmp_path / "data" / str(i) / "x.jpg").write_bytes(damaged_jpeg() if i else encode(picture(), "JPEG"))
    settings = [f"data.train={tmp_path / 'data'}", "train.global_batch=2", "cluster.workers=1"]
    assert run(digits, *settings, "--out", str(tmp_path / "grid.png")) == 0
    out, err = capsys.readouterr()
    assert "2 images of step 0" in out
    assert "1/x.jpg is broken, a uniform image takes its place" in err


def test_a_batch_that_cannot_be_made_is_told(digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(digits, "train.global_batch=2000", "--out", str(tmp_path / "grid.png")) == 2
    assert "1437 training images do not fill one train.global_batch=2000; lower it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("out", "message"),
    [("grid.xyz", "no picture format has the suffix '.xyz'"), ("no/such/grid.png", "cannot be written (No such file")],
)
def test_a_picture_that_cannot_be_written_is_told(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], out: str, message: str
) -> None:
    assert run(digits, "--out", str(tmp_path / out)) == 2
    assert message in capsys.readouterr().err
