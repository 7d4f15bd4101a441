"""Whole recipes through Ray: the modern one from shards on a web server, interrupted; and the demo's accuracy."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from commands import PIPELINE, ROOT, differences, state_of
from web import web_server

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

RECIPE = [
    "model.depth=18",
    "model.drop_path=0.1",
    "train.steps=34",
    "train.log_every=2",
    "train.ema_decay=0.9",
    "data.start_size=24",
    "data.grow_epochs=[0,1]",  # an epoch has 22 steps
    "data.auto_augment=trivial",
    "data.jitter=[0.2,0.2,0.2,0.05]",
    "data.erase=0.25",
    "data.mixup=0.2",
    "data.cutmix=1.0",
    "data.repeated_aug=2",
    "data.shuffle_block=32",
    "data.shuffle_window=8",
    "mlflow.log_model=false",
]


def pipeline(*args: str, timeout_s: float = 200) -> Any:
    done = subprocess.run([PIPELINE, *args, "--json"], text=True, capture_output=True, check=False, timeout=timeout_s)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.long
def test_a_run_from_remote_shards_goes_on_bitwise_with_its_cache_lost(digits: Path, tmp_path: Path) -> None:
    for split in ("train", "val"):
        told = pipeline("pack", str(digits / split), "--out", str(tmp_path / "web" / split), "--shard-mb", "1")
        assert told["images"] == len(list((digits / split).glob("*/*.jpg")))
    with web_server(tmp_path / "web") as server:
        shards = [f"data.{split}={server.storage}/{split}" for split in ("train", "val")]

        def train(name: str, *settings: str) -> Any:
            places = [f"run.storage={tmp_path / 'runs'}", f"run.name={name}", f"data.cache_dir={tmp_path / 'cache'}"]
            config = str(ROOT / "configs" / "digits.yaml")
            return pipeline("train", config, *shards, *RECIPE, *places, *settings)

        whole = train("whole")
        assert whole["step"] == 34
        assert train("parts", "run.stop_at_step=17")["step"] == 17
        shutil.rmtree(tmp_path / "cache")
        resumed = train("parts")
    assert (resumed["step"], resumed["status"]) == (34, "done")
    assert resumed["top1"] == whole["top1"]
    assert differences(state_of(tmp_path / "runs" / "parts"), state_of(tmp_path / "runs" / "whole")) == []
    assert list((tmp_path / "cache").rglob("chunks/*/*"))


@pytest.mark.thorough  # the demo, in CI, is held to its accuracy
def test_resnet18_learns_the_digits(digits: Path, tmp_path: Path) -> None:
    settings = ["model.depth=18", "cluster.workers=1", "train.precision=fp32", "mlflow.log_model=false"]
    places = [f"data.{split}={digits / split}" for split in ("train", "val")]
    words = ["train", str(ROOT / "configs" / "digits.yaml"), *settings, *places, f"run.storage={tmp_path}"]
    assert pipeline(*words, timeout_s=550)["top1"] >= 0.98
    (run,) = pipeline("runs", "--storage", str(tmp_path))
    assert (run["state"], run["resumes_at"]) == ("done", None)
    assert run["best_top1"] >= 0.98
