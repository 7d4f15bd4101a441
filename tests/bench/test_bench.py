"""The benchmarks: fair, steady, and telling the truth about ratios; memory and start-up at scale."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import ROOT
from PIL import Image

from pipeline.bench import loader
from pipeline.bench.loader_baselines import CEILING, OURS, LoaderBaseline, Task, loader_baselines
from pipeline.bench.loader_process import LoaderProcess, Speed
from pipeline.cli import app
from pipeline.config.data import DataConfig
from pipeline.config.loading import load
from pipeline.errors import UserError

SPEEDS = {
    name: [Speed(rate, rate / 2) for rate in rates]
    for name, rates in {
        OURS: [100.0, 300.0, 200.0],
        "slow": [50.0, 100.0, 50.0],
        "fast": [60.0, 90.0, 80.0],
        CEILING: [200.0, 400.0, 400.0],
    }.items()
}


def task(index: Path, num_rounds: int = 1) -> Task:
    data = DataConfig(train="-", val="-", image_size=24, val_resize=24)
    return Task(index, data, batch=8, cores=(0,), num_batches=2, num_rounds=num_rounds)


def test_ratios_are_taken_within_rounds_to_the_best_of_each() -> None:
    """A machine that slows down for a round must not change them."""
    summary = loader.summarise(SPEEDS, dict.fromkeys(SPEEDS, "threads"))
    assert summary["ratio"] == 2.5  # of 100/60, 300/100 and 200/80
    assert summary["cpu_ratio"] == 2.5
    assert summary["best_other"] == "fast"
    assert summary["decode_share"] == 0.5
    assert summary["loaders"][OURS]["images_per_s"] == 200.0
    assert summary["loaders"][OURS]["images_per_s_quartiles"] == [150.0, 250.0]


def test_the_table_names_everyone_and_ends_with_the_verdict(tmp_path: Path) -> None:
    head = {"train": "photos", "images": 9, "median_size": [375, 500], "image_size": 224, "batch": 4, "cores": 1}
    result = {**head, "rounds": 3, "images_per_round": 8, "what": loader.WHAT, "left_out": {"SPDL": "spdl-core"}}
    result |= loader.summarise(SPEEDS, dict.fromkeys(SPEEDS, "threads"))
    lines = loader.format_result(result)
    for name in SPEEDS:
        assert sum(line.startswith(f"{name} ") for line in lines) == 1
    assert "left out: SPDL; pip install spdl-core" in lines
    assert "2.50 times the best other" in lines[-1]
    assert "the aim of 1.5; by CPU time 2.50 times; 50% of its CPU time is decoding, so decoding" in lines[-1]
    loader.plot(result, tmp_path / "plot.png")
    with Image.open(tmp_path / "plot.png") as picture:
        assert picture.width > 600


@pytest.mark.filterwarnings("ignore:The image decoding and encoding capabilities of TorchVision:DeprecationWarning")
@pytest.mark.parametrize("baseline", [b for b in loader_baselines(1) if not b.workers], ids=lambda b: str(b.name))
def test_everyone_makes_the_same_batches(baseline: LoaderBaseline, digits_index: Callable[[str], Path]) -> None:
    """Another size, layout or a float output would be another amount of work; too few would end a round early."""
    wanted = task(digits_index("val"))
    batches = list(baseline.batches(baseline, wanted))
    assert len(batches) == baseline.num_ahead(wanted) + wanted.num_batches
    for images in batches:
        assert len(images) == 8
        if baseline.name != CEILING:
            assert images.shape == (8, 3, 24, 24)
            assert images.dtype == torch.uint8


def test_nothing_is_measured_that_the_other_loaders_do_not_do() -> None:
    """The paper's scale augmentation and the augmentations of A1 are none of theirs."""
    for recipe in (ROOT / "configs" / "imagenet").glob("*.yaml"):
        cfg = load(recipe).data
        plain = loader.plain_config(cfg)
        assert (plain.image_size, plain.crop_scale, plain.flip) == (cfg.image_size, cfg.crop_scale, cfg.flip)
        assert (plain.crop_short, plain.auto_augment, plain.repeated_aug, plain.mixes) == (None, "none", 1, False)


def test_more_cores_than_there_are_are_told_at_once() -> None:
    cfg = load(None, ["data.train=nowhere", "data.val=nowhere"])
    with pytest.raises(UserError, match=r"--cores 1000: this process may use [0-9]+; lower it"):
        loader.bench_loader(cfg, 1000, 1, 1, lambda *_: None)


def _steady_behind_a_full_queue(baseline: LoaderBaseline, wanted: Task) -> Iterator[Any]:
    """What was made ahead comes at once, all else takes 50 ms a batch of 8."""
    for _ in range(wanted.num_rounds):
        yield from [range(8)] * baseline.num_ahead(wanted)
        for _ in range(wanted.num_batches):
            time.sleep(0.05)
            yield range(8)


def _broken(baseline: LoaderBaseline, wanted: Task) -> Iterator[Any]:
    raise OSError("no data")


@pytest.mark.e2e
def test_a_round_leaves_out_what_was_made_ahead(digits_index: Callable[[str], Path]) -> None:
    process = LoaderProcess(
        LoaderBaseline("steady", _steady_behind_a_full_queue, workers=2), task(digits_index("val"), num_rounds=2)
    )
    try:
        for _ in range(2):
            assert process.run_round().per_s == pytest.approx(160, rel=0.2)
    finally:
        process.end()


@pytest.mark.e2e
def test_a_loader_that_fails_is_named(digits_index: Callable[[str], Path]) -> None:
    process = LoaderProcess(LoaderBaseline("broken one", _broken), task(digits_index("val")))
    try:
        with pytest.raises(RuntimeError, match="the loader 'broken one' has failed"):
            process.run_round()
    finally:
        process.end()


@pytest.mark.e2e
@pytest.mark.long
@pytest.mark.timeout(600)
def test_bench_loader_measures_all(digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["configs/digits.yaml", f"data.train={digits / 'val'}", "data.auto_augment=rand", "train.global_batch=16"]
    options = ["--rounds", "2", "--images", "32", "--out", str(tmp_path / "out"), "--json"]
    assert app.main(["bench", "loader", *words, *options]) == 0
    result = json.loads(capsys.readouterr().out)
    assert set(result["loaders"]) == {baseline.name for baseline in loader_baselines(result["cores"])}
    assert all(
        len(measured["per_round"]) == 2 and min(measured["per_round"]) > 0 for measured in result["loaders"].values()
    )
    assert json.loads((tmp_path / "out" / "loader.json").read_text()) == result
    assert (tmp_path / "out" / "loader.png").stat().st_size > 1000


def _script(name: str, *options: str) -> Any:
    """What a script prints as JSON; it must end with 0."""
    command = [sys.executable, str(ROOT / "scripts" / name), *options, "--json"]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)


@pytest.mark.e2e
@pytest.mark.thorough
@pytest.mark.timeout(900)
def test_memory_stays_flat_over_ten_thousand_batches() -> None:
    for measured in _script("bench_memory.py", "--batches", "10000", "--threads", "2").values():
        assert len(measured["samples_mb"]) == 100
        assert measured["growth"] <= 0.05


@pytest.mark.e2e
def test_ids_come_without_loading_the_index(tmp_path: Path) -> None:
    """The table of 2 million rows has 108 MB: a copy of it would show."""
    result = _script("bench_order.py", "--rows", "2000000", "--rounds", "1", "--folder", str(tmp_path))
    for name, (measured,) in result["rounds"].items():
        assert measured["seconds"] < 2, name
        assert name.startswith("torch") or measured["private_mb"] < 50, name
