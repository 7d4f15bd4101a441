"""Broken images in MLflow: each counted once, whichever ranks meet it, and all of them named."""

import shutil
from pathlib import Path
from typing import Any

import mlflow
from ranks import FAST, context, run_ranks

from pipeline.config.loading import load
from pipeline.data.indexing.build import build_index
from pipeline.events import BrokenImage, Event, StepLogged
from pipeline.runs.spec import RunSpec
from pipeline.storage import Storage
from pipeline.training.loop import fit

EPOCHS = 3
SETTINGS = ["train.steps=null", f"train.epochs={EPOCHS}", "train.eval_every=3", "train.global_batch=8"]
SETTINGS += ["train.precision=fp32"]  # oneDNN's bf16 gradients of so small images are not always finite
SETTINGS += ["train.log_every=2", "data.max_bad_fraction=0.5", "data.image_size=16", "data.val_resize=16"]


def train(rank: int, world_size: int, spec: RunSpec) -> tuple[list[str], list[float], Any]:
    """What this rank names; on rank 0 the logged counts and the summary."""
    events: list[Event] = []
    summary = fit(spec, context(rank, world_size, events))
    counts = [e.metrics["data/bad_images"] for e in events if isinstance(e, StepLogged)]
    return [e.path for e in events if isinstance(e, BrokenImage)], counts, summary


def test_each_is_counted_once_and_named_in_mlflow(digits: Path, tmp_path: Path) -> None:
    """Three epochs of 24 images: both ranks meet some of the same; one more is in the evaluation after the last log."""
    for split, number in (("train", 8), ("val", 4)):
        for label in "012":
            (tmp_path / split / label).mkdir(parents=True)
            for file in sorted((digits / "val" / label).iterdir())[:number]:
                shutil.copy(file, tmp_path / split / label)
        build_index(tmp_path / split)[0].save(tmp_path / f"{split}.arrow")
    broken = [*sorted((tmp_path / "train").glob("*/*.jpg"))[::4], next((tmp_path / "val").glob("1/*.jpg"))]
    for file in broken:
        file.write_bytes(b"no image")
    data = [f"data.{split}={tmp_path}/{split}.arrow" for split in ("train", "val")]
    cfg = load(None, [*FAST, *data, *SETTINGS, f"run.storage={tmp_path}"])
    (tmp_path / "run").mkdir()
    spec = RunSpec(cfg, Storage(tmp_path / "run"), str(tmp_path / "train.arrow"), str(tmp_path / "val.arrow"))

    (first, counts, summary), (second, _, _) = run_ranks(train, 2, spec)

    assert set(first) & set(second), "both have met one, or this shows nothing"
    assert (counts[-1], len(broken)) == (6, 7), "the evaluation comes after the last log"
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    text = Path(client.download_artifacts(summary["mlflow_run_id"], "broken_images/attempt_1.txt")).read_text()
    assert [line.partition(": ")[0] for line in text.splitlines()] == sorted(map(str, broken))
    assert all(line.partition(": ")[2] for line in text.splitlines()), "each has its reason"
