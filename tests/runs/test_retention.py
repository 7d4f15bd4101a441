"""Which checkpoints stay: never fewer valid ones for what is damaged, foreign or of a later version."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.config.loading import load
from pipeline.runs import checkpoint, retention
from pipeline.storage import Storage

CFG = load(None, ["data.train=x", "data.val=x"])


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    def save_at(step: int, top1: float | None = None, training_id: str = "t") -> Path:
        metrics = {} if top1 is None else {"top1": top1}
        meta = {"training_id": training_id, "fingerprint": "f", "classes": ["a"], "metrics": metrics}
        return checkpoint.save(Storage(tmp_path), {"step": step}, CFG, meta).path

    return save_at


def steps(folder: Path) -> list[int]:
    return [int(path.name.removeprefix("step_")) for path in sorted(folder.glob("step_*"))]


def change_meta(path: Path, **values: object) -> None:
    meta = json.loads((path / checkpoint.META).read_text())
    (path / checkpoint.META).write_text(json.dumps({**meta, **values}))


def test_the_newest_and_the_best_stay(save: Callable[..., Path], tmp_path: Path) -> None:
    for step, top1 in [(1, 0.2), (2, 0.9), (3, None), (4, 0.5), (5, None), (6, 0.9 - 1e-9)]:
        save(step, top1)
    (tmp_path / ".step_00000009.123").mkdir()
    retention.prune(Storage(tmp_path), 2, "t", 6)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000002", "step_00000005", "step_00000006"]


@pytest.mark.parametrize("deleted", [checkpoint.META, checkpoint.STATE, checkpoint.CONFIG])
def test_a_deletion_that_broke_off_is_ended(save: Callable[..., Path], tmp_path: Path, deleted: str) -> None:
    """A killed process, or a failing disk, leaves some of its files; the newest may be one that is being written."""
    for step in (1, 2, 3):
        save(step)
    (tmp_path / "step_00000001" / deleted).unlink()
    shutil.copytree(tmp_path / "step_00000001", tmp_path / "step_00000004")
    retention.prune(Storage(tmp_path), 2, "t", 3)
    assert steps(tmp_path) == [2, 3, 4]


def test_what_cannot_be_used_takes_no_place(save: Callable[..., Path], tmp_path: Path) -> None:
    """Such as after a resume from an older checkpoint, which the newer ones' damage called for."""
    for step in (1, 2, 3):
        save(step)
    save(7, training_id="another", top1=1.0)
    (save(8) / checkpoint.STATE).write_bytes(b"cut off")
    change_meta(save(9), format=checkpoint.FORMAT + 1, files={"weights.bin": {}})
    retention.prune(Storage(tmp_path), 2, "t", 3)
    assert steps(tmp_path) == [2, 3, 7, 8, 9]
    assert retention.best_of(retention.own(Storage(tmp_path), "t")) is None


def test_what_is_known_to_be_valid_stays(save: Callable[..., Path], tmp_path: Path) -> None:
    """Sizes do not tell of a flipped bit in the newer ones."""
    for step in (1, 2, 3, 4):
        save(step)
    retention.prune(Storage(tmp_path), 2, "t", 1)
    assert steps(tmp_path) == [1, 3, 4]
    assert retention.make_room(Storage(tmp_path), "t", {3}) is not None
    assert steps(tmp_path) == [3, 4]
    assert retention.make_room(Storage(tmp_path), "t", {3}) is None


def test_room_is_made_by_the_oldest(save: Callable[..., Path], tmp_path: Path) -> None:
    save(1, top1=0.9)
    save(2, top1=0.1)
    save(3)
    save(4, training_id="another")
    gone = retention.make_room(Storage(tmp_path), "t", ())
    assert gone is not None
    assert gone.step == 2
    assert retention.make_room(Storage(tmp_path), "t", ()) is None
    assert steps(tmp_path) == [1, 3, 4]


def test_room_is_not_made_by_what_frees_none(
    save: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that waits for MLflow is linked aside; another user's cannot be deleted."""
    (tmp_path / "run").mkdir()
    os.link(save(1) / checkpoint.STATE, tmp_path / "run" / "aside")
    save(2)
    save(3)
    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", lambda *_, **__: None)
        assert retention.make_room(Storage(tmp_path), "t", ()) is None
    gone = retention.make_room(Storage(tmp_path), "t", ())
    assert gone is not None
    assert (gone.step, steps(tmp_path)) == (2, [1, 3])
    assert retention.make_room(Storage(tmp_path), "t", ()) is None


def test_an_upload_that_broke_off_is_deleted() -> None:
    """By a process that was killed: in an object store files have names of their own, and meta.json comes last."""
    folder = Storage("memory://uploads")
    for step in (1, 2, 3):
        meta = {"training_id": "t", "fingerprint": "f", "classes": ["a"], "metrics": {}}
        checkpoint.save(folder, {"step": step}, CFG, meta)
    names = (folder / "step_00000001").names()
    for broken, kept in (("step_00000000", "state-"), ("step_00000004", "state-")):
        for name in names:
            if name.startswith(kept):
                (folder / broken).write_bytes(name, b"some of it")
    retention.prune(folder, 3, "t", 3)
    assert folder.names() == [f"step_0000000{step}" for step in (1, 2, 3, 4)], "the newest may be in the making"
    folder.remove()
    shutil.rmtree(folder.local_dir)
