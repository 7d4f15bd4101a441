"""Images that kill the process that decodes them: found in a child, left out by all attempts, and the run goes on."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import PIPELINE, ROOT, Start, Training, command_line, descendants, differences, history, kill, state_of
from killing import ALWAYS, ANY_BATCH, BY_CHANCE, HANGS, KILLER, write_site
from ranks import context
from test_broken import write

from pipeline.config.data import DataConfig
from pipeline.config.loading import load
from pipeline.data.batch_spec import EvalSpecs, make_sampler
from pipeline.data.indexing.build import build_index
from pipeline.data.loading import isolate
from pipeline.data.loading.isolate import Isolation
from pipeline.data.loading.loader import LoaderContext
from pipeline.errors import UserError
from pipeline.events import BrokenImage, CrashingImageFound, Event, ImageSearchStarted, Note, StepLogged
from pipeline.failures import StoppedWaitingError
from pipeline.runs.spec import RunSpec
from pipeline.storage import Storage
from pipeline.training import inference
from pipeline.training.crashing_images import FOLDER, STEPS_AHEAD, steps_to_search
from pipeline.training.loop import fit

BATCH = 64  # in smaller ones DALI seldom dies
REASON = "it kills the process that decodes it (SIGSEGV)"


def search(folder: Path, killers: list[int], limit_s: float = 600) -> tuple[dict[int, str], list[str]]:
    """What is found in three batches with these killers among them, and the warnings."""
    index, _ = build_index(write(folder / "images", 3 * BATCH))
    index.save(folder / "images.arrow")
    for row in killers:
        (folder / "images" / "a" / f"{row:03d}.jpg").write_bytes(KILLER)
    cfg = DataConfig(train="-", val="-", image_size=32, val_resize=32, max_bad_fraction=0.1)
    specs = [EvalSpecs(cfg)(index, np.arange(3 * BATCH)[k * BATCH :][:BATCH]) for k in range(3)]
    warnings: list[str] = []
    context = LoaderContext(0, 1, torch.device("cpu"), num_threads=2)
    found: dict[int, str] = {}
    isolation = Isolation(folder / "images.arrow", index, cfg, context, BATCH, warnings.append)
    isolation.search(specs, [], found.__setitem__, time.monotonic() + limit_s)
    return found, warnings


@pytest.fixture
def patched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Has children let images with a damaged header through to DALI, and end by them in the given way."""
    return lambda end: monkeypatch.syspath_prepend(write_site(tmp_path / "site", end))


def test_those_that_kill_are_found(patched: Callable[[str], None], tmp_path: Path) -> None:
    """Two in one batch."""
    patched(ALWAYS)
    assert search(tmp_path, [70, 71]) == ({70: REASON, 71: REASON}, [])


def test_those_that_kill_by_chance_are_found(patched: Callable[[str], None], tmp_path: Path) -> None:
    """As DALI does it: where it does not die of an image it refuses it, which tells, too."""
    patched(BY_CHANCE)
    found, warnings = search(tmp_path, [70, 150])
    assert (list(found), warnings) == ([70, 150], [])
    assert all(reason == REASON or "nvImageCodec failure" in reason for reason in found.values())


def test_sound_images_are_not_accused(tmp_path: Path) -> None:
    assert search(tmp_path, []) == ({}, [])


def test_an_image_that_never_ends_is_found(
    patched: Callable[[str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    patched(HANGS)
    monkeypatch.setattr(isolate, "DECODE_S", 4.0)
    assert search(tmp_path, [70]) == ({70: "it kills the process that decodes it (no end after 4 s)"}, [])


def test_the_machines_failures_are_no_images(patched: Callable[[str], None], tmp_path: Path) -> None:
    """Where a child dies of anything, as for lack of memory, no image is accused."""
    patched(ANY_BATCH)
    found, (warning,) = search(tmp_path, [])
    assert found == {}
    assert "a process that decoded none of them ended, too (SIGSEGV)" in warning


def test_a_child_ends_with_its_parent(tmp_path: Path) -> None:
    site = write_site(tmp_path / "site", HANGS)
    code = f"from pathlib import Path; import test_isolate; test_isolate.search(Path({str(tmp_path)!r}), [70])"
    path = os.pathsep.join([str(site), *filter(None, sys.path)])
    environ = {**os.environ, "PYTHONPATH": path}
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parent, env=environ)
    try:
        (child,) = until(
            lambda: [p for p in descendants(parent.pid) if "pipeline.data.loading.isolate" in command_line(p)]
        )
    finally:
        parent.kill()
        parent.wait()
    try:
        until(lambda: "pipeline.data.loading.isolate" not in command_line(child))
    finally:
        kill(child)


def until(true: Callable[[], Any], timeout_s: float = 60) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (found := true()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return found


def test_steps_are_searched_from_what_is_known_to_be_done() -> None:
    assert steps_to_search((40, 43), 20, 1000) == list(range(40, 43 + STEPS_AHEAD))
    assert steps_to_search((0, 22), 20, 1000) == list(range(20, 22 + STEPS_AHEAD)), "before that it was not"
    assert steps_to_search((40, 43), 20, 50) == list(range(40, 50))
    assert steps_to_search((50, 50), 50, 50) == [], "the last evaluation, or the end"
    assert len(steps_to_search((5000, 9900), 5000, 10_000)) == STEPS_AHEAD + 100, "not all between the two"


def test_a_search_has_an_end(patched: Callable[[str], None], tmp_path: Path) -> None:
    """The other ranks wait for it. What it has found by then is kept."""
    patched(ALWAYS)
    found, (warning,) = search(tmp_path, [10, 150], limit_s=1)
    assert found == {10: REASON}
    assert warning == "3 batches are left where images may kill the process that decodes them"


def test_what_is_found_is_left_out_and_known_later(patched: Callable[[str], None], tmp_path: Path) -> None:
    """Of the training and the evaluation images, by this attempt and by the next, and by `evaluate`."""
    patched(ALWAYS)
    for name in ("train", "val"):
        index, _ = build_index(write(tmp_path / name, 2 * BATCH if name == "train" else BATCH))
        index.save(tmp_path / f"{name}.arrow")
    broken = [tmp_path / "train" / "a" / "005.jpg", tmp_path / "val" / "a" / "063.jpg"]
    for file in broken:
        file.write_bytes(KILLER)
    settings = [f"data.{name}={tmp_path}/{name}.arrow" for name in ("train", "val")]
    settings += ["data.image_size=16", "data.val_resize=16", "model.depth=18", "train.steps=4", "train.log_every=1"]
    settings.append("train.precision=fp32")  # oneDNN's bf16 gradients of so small images are not always finite
    settings += [
        f"train.global_batch={BATCH}",
        "optim.warmup_epochs=0",
        "mlflow.log_model=false",
        "mlflow.report=false",
    ]
    (tmp_path / "run").mkdir()
    cfg = load(None, [*settings, f"run.storage={tmp_path}"])
    spec = RunSpec(cfg, Storage(tmp_path / "run"), str(tmp_path / "train.arrow"), str(tmp_path / "val.arrow"))

    def train(stop: int, deaths: tuple[int, ...]) -> list[Event]:
        events: list[Event] = []
        stopped = replace(spec, cfg=replace(cfg, run=replace(cfg.run, stop_at_step=stop)))
        fit(stopped, replace(context(events=events), deaths=deaths))
        return events

    stopped = replace(context(), deaths=(0, 0), stop_reason=lambda: "interrupted")
    with pytest.raises(StoppedWaitingError, match="the search is left off"):
        fit(spec, stopped)
    assert spec.checkpoints.names() == []
    events = train(2, (0, 0))
    assert [e for e in events if isinstance(e, CrashingImageFound)] == [
        CrashingImageFound(str(file), REASON) for file in broken
    ]
    named = [BrokenImage(str(file), REASON) for file in broken]
    assert [e for e in events if isinstance(e, BrokenImage)] == named
    assert [e.metrics["data/bad_images"] for e in events if isinstance(e, StepLogged)][-1] == 1
    assert len((Storage(tmp_path / "run") / FOLDER).names()) == 2
    again = train(4, ())
    assert not [e for e in again if isinstance(e, CrashingImageFound | Note | ImageSearchStarted)]
    assert [e for e in again if isinstance(e, BrokenImage)] == named
    with pytest.raises(UserError, match=r"063\.jpg is broken \(it kills the process"):
        inference.evaluate_checkpoint(spec.checkpoints / "step_00000004", None, print)


@pytest.mark.e2e
@pytest.mark.timeout(400)
def test_a_run_goes_on_without_an_image_that_kills_its_workers(digits: Path, start: Start, tmp_path: Path) -> None:
    """Its weights are those of a run in which the same image is gone. No checkpoint comes between: two failures."""
    index, _ = build_index(digits / "train")
    index.save(tmp_path / "train.arrow")
    settings = ["model.depth=18", "train.global_batch=128", "train.steps=11", "train.log_every=1"]
    settings += ["mlflow.log_model=false", "mlflow.report=false"]
    settings += [f"data.train={tmp_path}/train.arrow", f"data.val={digits}/val", f"run.storage={tmp_path}/runs"]
    cfg = load(ROOT / "configs/digits.yaml", settings)
    sampler = make_sampler(cfg.data, len(index), cfg.train.global_batch, cfg.run.seed)
    row = int(sampler.rows(*sampler.positions(8, 1, 2))[5])  # of step 8, for the second of two workers
    image = digits / "train" / index.file(row)
    sound = image.read_bytes()

    def train(name: str, env: dict[str, str]) -> Training:
        training = start([PIPELINE, "train", str(ROOT / "configs/digits.yaml"), *settings, f"run.name={name}"], env)
        training.finish()
        return training

    try:
        image.unlink()
        gone = train("gone", {})
        image.write_bytes(bytes(200) + sound[200:])
        path = os.pathsep.join([str(write_site(tmp_path / "site", ALWAYS)), os.environ.get("PYTHONPATH", "")])
        killed = train("killed", {"PYTHONPATH": path.rstrip(os.pathsep)})
    finally:
        image.write_bytes(sound)
    assert (gone.process.returncode, killed.process.returncode) == (0, 0), killed.said
    assert "done at step 11 of 11" in killed.said
    assert (
        killed.said.count("failure: worker 1 was killed by signal 11 (SIGSEGV: segmentation fault); starting again")
        == 2
    ), killed.said
    assert killed.said.count("looking for images that kill them") == 1
    assert killed.said.count(f"{image}: {REASON}; a uniform image takes its place") == 1
    assert killed.said.count(f"{image} is broken") == 0, "it is named already"
    assert differences(state_of(tmp_path / "runs" / "gone"), state_of(tmp_path / "runs" / "killed")) == []
    store = f"sqlite:///{tmp_path}/runs/mlflow.db"
    bad = {name: history(store, name, "data/bad_images") for name in ("gone", "killed")}
    assert [values[-1].value for values in bad.values()] == [1, 1]
