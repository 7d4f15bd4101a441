"""Checkpoints: whole or not there, damage is found and named, nothing of a file is executed."""

import errno
import itertools
import json
import os
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline import versions
from pipeline.config.loading import load
from pipeline.config.schema import Config
from pipeline.failures import CheckpointError
from pipeline.models import pretrained
from pipeline.runs import checkpoint
from pipeline.storage import Storage
from pipeline.training.state import TrainState

META: dict[str, Any] = {
    "training_id": "t",
    "fingerprint": "f",
    "classes": ["a", "b"],
    "metrics": {},
    "mlflow_run_id": None,
}


@pytest.fixture(scope="module")
def cfg() -> Config:
    return load(None, ["data.train=x", "data.val=x", "model.depth=18", "train.ema_decay=0.9"])


@pytest.fixture(scope="module")
def state(cfg: Config) -> TrainState:
    return TrainState.create(cfg, 2, torch.device("cpu"))


@pytest.fixture
def save(tmp_path: Path, cfg: Config, state: TrainState) -> Callable[..., Path]:
    """Saves the state as if it were at `step`."""

    def save_at(step: int, top1: float | None = None) -> Path:
        state.step = step
        metrics = {} if top1 is None else {"top1": top1}
        return checkpoint.save(Storage(tmp_path), state.state_dict(), cfg, {**META, "metrics": metrics}).path

    return save_at


def test_what_is_saved_is_what_is_read(save: Callable[..., Path], cfg: Config, state: TrainState) -> None:
    path = save(7)
    found = checkpoint.load(Storage(path))
    assert found.step == 7
    restored = TrainState.create(load(None, ["run.seed=5", *_minimal()]), 2, torch.device("cpu"))
    restored.load_state_dict(found.state())
    for name, value in state.model.state_dict().items():
        assert torch.equal(restored.model.state_dict()[name], value)
    assert load(path / "config.yaml") == cfg
    model, loaded_cfg, classes = pretrained.load_model(Storage(path))
    assert (loaded_cfg, classes) == (cfg, ("a", "b"))
    assert not model.training


def _minimal() -> list[str]:
    return ["data.train=x", "data.val=x", "model.depth=18", "train.ema_decay=0.9"]


DAMAGES: dict[str, Callable[[Path], object]] = {
    "state.pt is damaged": lambda p: (p / "state.pt").write_bytes((p / "state.pt").read_bytes()[:-100]),
    "state.pt is missing": lambda p: (p / "state.pt").unlink(),
    "config.yaml is damaged": lambda p: (p / "config.yaml").write_text("run: {}"),
    "no usable meta.json": lambda p: (p / "meta.json").write_text("{"),
    "meta.json is missing": lambda p: (p / "meta.json").unlink(),
    "no usable meta.json ": lambda p: (p / "meta.json").write_text('{"format": 1}'),
    "has format 99": lambda p: _edit_meta(p, format=99),
    "meta.json is missing, ": lambda p: _empty(p),
}


def _empty(path: Path) -> None:
    shutil.rmtree(path)
    path.mkdir()


def _edit_meta(path: Path, **changes: Any) -> None:
    (path / "meta.json").write_text(json.dumps({**json.loads((path / "meta.json").read_text()), **changes}))


def test_it_is_written_also_where_there_is_no_git(
    save: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in the image."""
    monkeypatch.setenv("PATH", str(tmp_path))
    versions.software.cache_clear()
    assert checkpoint.load(Storage(save(1))).meta["git_commit"] is None
    versions.software.cache_clear()


@pytest.mark.parametrize("reason", DAMAGES)
def test_damage_is_named_and_skipped(save: Callable[..., Path], tmp_path: Path, reason: str) -> None:
    older, newer = save(1), save(2)
    DAMAGES[reason](newer)
    with pytest.raises(CheckpointError, match=reason.strip()):
        checkpoint.load(Storage(newer))
    reports: list[str] = []
    found = checkpoint.newest_valid(Storage(tmp_path), reports.append)
    assert found is not None
    assert found.path == older
    assert len(reports) == 1
    assert "step_00000002" in reports[0]


def test_a_flipped_bit_anywhere_is_found(save: Callable[..., Path]) -> None:
    path, random_places = save(1), random.Random(0)
    whole = bytearray((path / "state.pt").read_bytes())
    for _ in range(5):
        place = random_places.randrange(len(whole))
        whole[place] ^= 1 << random_places.randrange(8)
        (path / "state.pt").write_bytes(whole)
        with pytest.raises(CheckpointError, match=r"state\.pt is damaged"):
            checkpoint.load(Storage(path))
        whole = bytearray(whole)


def test_none_of_100_damaged_checkpoints_is_loaded(tmp_path: Path, cfg: Config) -> None:
    """Seeded damage of every kind; each time the older one is found, and the damaged one reported by name.

    Of a small state, since 100 copies of a network's are 9 GB: what is checked is bytes.
    """
    states = ({"step": step, "model": {"fc.weight": torch.full((300, 100), float(step))}} for step in (1, 2, 3))
    saved = [checkpoint.save(Storage(tmp_path), state, cfg, META) for state in states]
    older, sound, other = (one.path for one in saved)
    kept = {path.name: path.rename(tmp_path / f"kept_{path.name}") for path in (sound, other)}
    for seed in range(100):
        rng = random.Random(seed)
        shutil.copytree(kept[sound.name], sound)
        kind = list(HURTS)[seed % len(HURTS)]
        HURTS[kind](sound, kept[other.name], rng)
        reports: list[str] = []
        found = checkpoint.newest_valid(Storage(tmp_path), reports.append, training_id="t")
        assert found is not None, (seed, kind)
        assert found.path == older, (seed, kind)
        assert [str(sound) in report for report in reports] == [True], (seed, kind, reports)
        if sound.is_dir():
            shutil.rmtree(sound)
        else:
            sound.unlink()


def _any_file(path: Path, rng: random.Random) -> Path:
    return path / rng.choice(["state.pt", "config.yaml", "meta.json"])


def _truncate(path: Path, other: Path, rng: random.Random) -> None:
    file = _any_file(path, rng)
    os.truncate(file, rng.randrange(file.stat().st_size))


def _flip(path: Path, other: Path, rng: random.Random) -> None:
    file = path / rng.choice(["state.pt", "config.yaml"])
    place = rng.randrange(file.stat().st_size)
    with file.open("r+b") as f:
        f.seek(place)
        byte = f.read(1)[0]
        f.seek(place)
        f.write(bytes([byte ^ 1 << rng.randrange(8)]))


def _swap(path: Path, other: Path, rng: random.Random) -> None:
    """A file, or all, of another step's checkpoint."""
    if rng.random() < 0.3:
        shutil.rmtree(path)
        shutil.copytree(other, path)
    else:
        name = rng.choice(["state.pt", "meta.json"])
        shutil.copy(other / name, path / name)


def _become_a_file(path: Path, other: Path, rng: random.Random) -> None:
    shutil.rmtree(path)
    path.write_text("step")


def _lose(path: Path, other: Path, rng: random.Random) -> None:
    _any_file(path, rng).unlink()


def _half_upload(path: Path, other: Path, rng: random.Random) -> None:
    (path / "meta.json").unlink()
    os.truncate(path / "state.pt", rng.randrange((path / "state.pt").stat().st_size))


HURTS: dict[str, Callable[[Path, Path, random.Random], object]] = {
    "truncated": _truncate,
    "bit flipped": _flip,
    "file missing": _lose,
    "of another step": _swap,
    "emptied file": lambda path, other, rng: _any_file(path, rng).write_bytes(b""),
    "empty": lambda path, other, rng: _empty(path),
    "half uploaded": _half_upload,
    "of another training": lambda path, other, rng: _edit_meta(path, training_id=f"u{rng.random()}"),
    "of a later version": lambda path, other, rng: _edit_meta(path, format=rng.randrange(2, 99)),
    "meta of another kind": lambda path, other, rng: (path / "meta.json").write_text(rng.choice(["[]", "1", '"x"'])),
    "no directory": _become_a_file,
}


@pytest.mark.parametrize(
    ("settings", "num_classes", "message"),
    [
        (["model.depth=34"], 2, r"layer1\.2\.bn1\.bias is only in the model"),
        ([], 3, r"fc\.bias is \(2,\) in the saved weights and \(3,\) in the model"),
        (["optim.name=adamw"], 2, "its optimizer is SGD, and optim.name makes this one AdamW"),
    ],
)
def test_a_state_that_does_not_fit_says_where(
    save: Callable[..., Path], settings: list[str], num_classes: int, message: str
) -> None:
    saved = checkpoint.load(Storage(save(1))).state()
    other = TrainState.create(load(None, [*_minimal(), *settings]), num_classes, torch.device("cpu"))
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(saved)


def test_an_optimizer_whose_shapes_do_not_fit_says_where(save: Callable[..., Path], state: TrainState) -> None:
    saved = checkpoint.load(Storage(save(1))).state()
    saved["optimizer"]["state"][0]["momentum_buffer"] = torch.zeros(5)
    with pytest.raises(ValueError, match=r"momentum_buffer of conv1\.weight is \(5,\) in the saved optimizer"):
        state.load_state_dict(saved)


def test_the_optimizers_settings_are_the_configurations(save: Callable[..., Path]) -> None:
    """torch would go on with the saved ones, so that a change of weight decay had no effect."""
    saved = checkpoint.load(Storage(save(1))).state()
    other = TrainState.create(load(None, [*_minimal(), "optim.weight_decay=0.5"]), 2, torch.device("cpu"))
    other.load_state_dict(saved)
    assert [group["weight_decay"] for group in other.optimizer.param_groups] == [0.5, 0.0]


def test_loading_executes_nothing(save: Callable[..., Path], tmp_path: Path) -> None:
    path = save(1)
    victim = tmp_path / "executed"

    class Attack:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (victim,)

    torch.save({"step": 1, "model": Attack()}, path / "state.pt")
    _edit_meta(path, files={n: checkpoint._digest(path / n) for n in ("state.pt", "config.yaml")})
    with pytest.raises(pickle.UnpicklingError):
        checkpoint.load(Storage(path)).state()
    assert not victim.exists()


def test_a_failed_save_leaves_nothing_behind(
    save: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(1)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space"):
        save(2)
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000001"]


def test_saving_again_replaces_a_damaged_one(save: Callable[..., Path], tmp_path: Path) -> None:
    (save(1) / "state.pt").write_bytes(b"")
    save(1)
    assert checkpoint.newest_valid(Storage(tmp_path), pytest.fail) is not None


@pytest.mark.parametrize("failures", [1, 100])
def test_a_checkpoint_that_cannot_be_read_is_not_called_damaged(
    failures: int, save: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is tried again; only where that does not help, the one before it takes its place."""
    save(step=1)
    save(step=2)
    monkeypatch.setattr("pipeline.failures.backoff", lambda: itertools.repeat(0.01))
    monkeypatch.setattr(checkpoint, "READ_CHECKPOINT_S", 0.3)
    left, really = failures, checkpoint.read_meta

    def fail(place: Storage) -> dict[str, Any]:
        nonlocal left
        if place.name.endswith("2") and left:
            left -= 1
            raise OSError(errno.EIO, "the answer broke off")
        return really(place)

    monkeypatch.setattr(checkpoint, "read_meta", fail)
    told: list[str] = []
    found = checkpoint.newest_valid(Storage(tmp_path), told.append)
    assert found is not None
    assert found.step == (2 if failures == 1 else 1)
    assert told[0].startswith("the storage does not answer, trying again")
    assert told[-1].startswith("skipped a checkpoint: ") == (failures > 1)


def test_where_none_can_be_read_nothing_is_said_of_damage(
    save: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the advice would be to begin at step 0."""
    save(step=1)
    monkeypatch.setattr(checkpoint, "READ_CHECKPOINT_S", 0.0)

    def fail(place: Storage) -> dict[str, Any]:
        raise OSError(errno.EIO, "the answer broke off")

    monkeypatch.setattr(checkpoint, "read_meta", fail)
    with pytest.raises(OSError, match="the answer broke off"):
        checkpoint.newest_valid(Storage(tmp_path), lambda _: None)


def test_an_empty_or_missing_folder_has_no_checkpoint(tmp_path: Path) -> None:
    assert checkpoint.newest_valid(Storage(tmp_path), pytest.fail) is None
    assert checkpoint.newest_valid(Storage(tmp_path / "none"), pytest.fail) is None


def test_a_moved_checkpoint_still_reads(save: Callable[..., Path], tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere" / "copy"
    shutil.copytree(save(3), moved)
    assert checkpoint.load(Storage(moved)).step == 3
