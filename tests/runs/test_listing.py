"""`pipeline runs`: each state as real checkpoints, a real lock and a killed process make it; damage hides no other."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import kill
from ranks import FAST, context
from s3 import s3_storage

from pipeline.cli import app
from pipeline.config.loading import load
from pipeline.errors import UserError
from pipeline.runs import checkpoint, listing
from pipeline.runs.manifest import RunManifest
from pipeline.runs.spec import RunSpec
from pipeline.storage import Storage
from pipeline.training.loop import fit

HOLD = """
import sys, time
from pipeline.runs.lock import run_lock
from pipeline.storage import Storage
with run_lock(Storage(sys.argv[1]), print):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture(scope="module")
def stopped(digits_index: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was asked to end after two of six steps, the first of which was evaluated."""
    storage = tmp_path_factory.mktemp("runs")
    train, val = str(digits_index("train")), str(digits_index("val"))
    length = [
        "train.global_batch=64",
        "train.steps=6",
        "run.stop_at_step=2",
        "train.log_every=1",
        "optim.warmup_epochs=0.01",
    ]
    cfg = load(None, [f"data.train={val}", f"data.val={val}", *FAST, *length, f"run.storage={storage}"])
    (storage / "stopped").mkdir()
    summary = fit(RunSpec(cfg, Storage(storage / "stopped"), val, train), context())
    assert summary["status"] == "stopped"
    return storage / "stopped"


@pytest.fixture
def copy(stopped: Path, tmp_path: Path) -> Callable[..., Path]:
    """Copies that run into an empty storage; its meta.json may say something else."""

    def make(name: str, **changes: Any) -> Path:
        shutil.copytree(stopped, tmp_path / name, copy_function=_copy)
        newest = max((tmp_path / name / "checkpoints").iterdir())
        meta = json.loads((newest / "meta.json").read_text())
        (newest / "meta.json").write_text(json.dumps(meta | changes))
        return tmp_path / name

    return make


def _copy(source: str, target: str) -> None:
    """Weights are linked: they are large."""
    (os.link if source.endswith("state.pt") else shutil.copy)(source, target)


def states(storage: Path) -> dict[str, tuple[str, int | None]]:
    """(state, where it resumes) by name."""
    return {one.name: (one.state, one.resumes_at) for one in listing.listed(Storage(storage))}


def set_open(run: Path) -> None:
    """As an attempt leaves run.json that could not tell of its end."""
    manifest = RunManifest.read(Storage(run), pytest.fail)
    assert manifest is not None
    dataclasses.replace(manifest, open=True).write(Storage(run))


def test_what_is_known_of_a_stopped_run(stopped: Path) -> None:
    (one,) = listing.listed(Storage(stopped.parent))
    newest = checkpoint.newest_valid(Storage(stopped / "checkpoints"), pytest.fail)
    assert newest is not None
    assert (one.name, one.state, one.step, one.num_steps, one.resumes_at) == ("stopped", "stopped", 2, 6, 2)
    assert one.images_per_s is not None
    assert one.images_per_s == newest.meta["images_per_s"] > 0
    assert one.best_top1 == (newest.state()["best_top1"] if newest.state()["best_top1"] >= 0 else None)
    assert one.changed is not None
    assert 0 <= time.time() - one.changed < 600
    assert one.problem is None


def test_a_live_process_trains_and_a_killed_one_died(copy: Callable[..., Path]) -> None:
    run = copy("mine")
    set_open(run)
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(run)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "held\n"
        assert states(run.parent) == {"mine": ("training", None)}
        assert states(run.parent) == {"mine": ("training", None)}, "looking does not take the lock away"
    finally:
        kill(process.pid)
        process.wait(30)
        process.stdout.close()
    assert states(run.parent) == {"mine": ("died", 2)}


def test_the_other_states(copy: Callable[..., Path], tmp_path: Path) -> None:
    copy("done", num_steps=2, metrics={"top1": 0.5})
    copy("not-evaluated", num_steps=2, metrics={})
    copy("stopped")
    shutil.rmtree(copy("new") / "checkpoints")
    shutil.rmtree(copy("died-early") / "checkpoints")
    set_open(tmp_path / "died-early")
    (tmp_path / "mlartifacts").mkdir()
    (tmp_path / "mlflow.db").write_bytes(b"")
    assert states(tmp_path) == {
        "done": ("done", None),
        "not-evaluated": ("stopped", 2),
        "stopped": ("stopped", 2),
        "new": ("new", 0),
        "died-early": ("died", 0),
    }


def replace_state(run: Path, content: bytes) -> None:
    state = max((run / "checkpoints").iterdir()) / "state.pt"
    state.unlink()  # it is another run's, too
    state.write_bytes(content)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"step": "x"}', bytes(range(256))])
def test_damage_is_told_and_hides_no_run(copy: Callable[..., Path], tmp_path: Path, content: bytes) -> None:
    copy("sound")
    (copy("no-identity") / "run.json").write_bytes(content)
    (max((copy("no-meta") / "checkpoints").iterdir()) / "meta.json").write_bytes(content)
    replace_state(copy("cut-off"), content)
    copy("odd-files", files={"state.pt": None})
    copy("odd-figures", num_steps="many", best_top1=None, images_per_s=[1], saved_at="now")
    found = {one.name: one for one in listing.listed(Storage(tmp_path))}
    assert len(found) == 6
    assert (found["sound"].problem, found["sound"].resumes_at) == (None, 2)
    assert (found["no-identity"].problem, found["no-identity"].resumes_at) == ("run.json is damaged", 2)
    for name in ("no-meta", "cut-off", "odd-files"):
        assert "step_00000002 is damaged" in str(found[name].problem)
        assert found[name].resumes_at in (None, 1), "not from there"
    assert (found["odd-figures"].state, found["odd-figures"].num_steps) == ("stopped", None)
    lines = listing.table(list(found.values()))
    assert "no-identity: run.json is damaged" in lines
    assert any(line.startswith("no-meta: step_00000002 is damaged") for line in lines)


def test_the_table_fits_80_columns_and_the_last_change_is_first(copy: Callable[..., Path], tmp_path: Path) -> None:
    long = {"num_steps": 450360, "images_per_s": 12470.3, "best_top1": 0.78312}
    for age, name in enumerate(["a" * 24, "solar-resnet152-a1-seed3", "b"]):
        copy(name, **long, saved_at=time.time() - 7200 * age)
    found = [dataclasses.replace(one, step=450100, resumes_at=450100) for one in listing.listed(Storage(tmp_path))]
    lines = listing.table(found)
    assert max(map(len, lines)) <= 80
    assert [line.split()[0] for line in lines] == ["RUN", "a" * 24, "solar-resnet152-a1-seed3", "b"]
    assert [line.split()[-4:-2] for line in lines[2:]] == [["2", "h"], ["4", "h"]]
    assert lines[1].split()[1:5] == ["stopped", "450100/450360", "0.7831", "12470"]


def test_what_comes_after_a_trainings_end_is_no_change_of_it(
    copy: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """`pipeline sync` takes the lock, and writes beside it."""
    run = copy("ended", saved_at=1000.0)
    assert app.main(["sync", str(run)]) == 0
    assert capsys.readouterr().out.startswith("MLflow at ")
    (one,) = listing.listed(Storage(run.parent))
    assert one.changed == 1000.0
    set_open(run)
    (one,) = listing.listed(Storage(run.parent))
    assert one.changed is not None
    assert time.time() - one.changed < 600, "an attempt that goes on has more to change than checkpoints"


def test_the_command(copy: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert app.main(["runs", "--storage", str(tmp_path / "nowhere")]) == 2
    assert f"--storage {tmp_path}/nowhere: no such folder; name the place" in capsys.readouterr().err
    assert app.main(["runs", "--storage", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"no runs in {tmp_path}\n"
    copy("one")
    assert app.main(["runs", "--storage", str(tmp_path), "--json"]) == 0
    (one,) = json.loads(capsys.readouterr().out)
    assert (one["name"], one["state"], one["step"], one["num_steps"]) == ("one", "stopped", 2, 6)
    assert app.main(["runs", "--storage", "s4://bucket"]) == 2
    assert "run.storage=s4://bucket: " in capsys.readouterr().err


@pytest.fixture(scope="module")
def bucket() -> Iterator[Storage]:
    with s3_storage() as storage:
        yield storage


def test_an_object_store_has_no_locks(bucket: Storage, copy: Callable[..., Path]) -> None:
    run = copy("small", files={"state.pt": {"size": 3}, "config.yaml": {"size": 3}})
    for name, is_open in (("ended", False), ("going", True)):
        there = bucket / name
        newest = max((run / "checkpoints").iterdir())
        for file, content in {
            "state.pt": b"abc",
            "config.yaml": b"abc",
            "meta.json": (newest / "meta.json").read_bytes(),
        }.items():
            (there / "checkpoints" / newest.name).write_bytes(file, content)
        manifest = RunManifest.read(Storage(run), pytest.fail)
        assert manifest is not None
        dataclasses.replace(manifest, open=is_open).write(there)
    found = {one.name: one for one in listing.listed(bucket)}
    assert [(found[name].state, found[name].resumes_at) for name in ("ended", "going")] == [("stopped", 2), ("open", 2)]
    assert all(one.changed is not None and time.time() - one.changed < 600 for one in found.values())
    nowhere = bucket.parent / "other"
    with pytest.raises(UserError, match="no such folder; name the place where runs lie"):
        listing.listed(nowhere)


def test_no_weights_are_read(copy: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    size = (max((copy("big") / "checkpoints").iterdir()) / "state.pt").stat().st_size
    replace_state(tmp_path / "big", bytes(size))  # damaged, and the listing does not see it: it would have to read it
    monkeypatch.setattr(torch, "load", pytest.fail)
    assert states(tmp_path) == {"big": ("stopped", 2)}
