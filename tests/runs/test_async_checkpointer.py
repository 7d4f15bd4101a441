"""Checkpoints beside training: the loop waits for a copy only, one is written at a time, a full disk is survived."""

import dataclasses
import errno
import itertools
import os
import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.config.loading import load
from pipeline.config.schema import Config
from pipeline.runs import checkpoint, retention
from pipeline.runs.async_checkpointer import AsyncCheckpointer
from pipeline.runs.checkpoint import Checkpoint
from pipeline.runs.claim import SupersededError
from pipeline.runs.host_copy import to_host
from pipeline.storage import Storage
from pipeline.training.state import TrainState

META: dict[str, Any] = {"training_id": "t", "fingerprint": "f", "classes": ["a", "b"], "metrics": {}}


@pytest.fixture(scope="module")
def cfg() -> Config:
    return load(None, ["data.train=x", "data.val=x", "model.depth=18", "train.ema_decay=0.9", "checkpoint.keep=2"])


@pytest.fixture
def state(cfg: Config) -> TrainState:
    return TrainState.create(cfg, 2, torch.device("cpu"))


class Watched:
    """A saver and what it says."""

    def __init__(
        self,
        folder: Path,
        cfg: Config,
        newest: Checkpoint | None = None,
        check: Callable[[], None] = lambda: None,
    ):
        self.written: list[Checkpoint] = []
        self.scores: dict[str, float] = {}
        self.reports: list[str] = []
        self.checkpointer = AsyncCheckpointer(
            Storage(folder),
            cfg,
            check=check,
            newest=newest,
            written=lambda saved, seconds: self.written.append(saved),
            warn=self.reports.append,
        )

    def save(self, state: TrainState, step: int) -> None:
        state.step = step
        self.checkpointer.save(state.step, state.finite_state_dict, self._meta, now=True)

    def _meta(self) -> dict[str, Any]:
        return {**META, "metrics": self.scores, "damaged": self.checkpointer.damaged}


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Writing waits for this event; the real one follows."""
    opened, real = threading.Event(), checkpoint.save

    def slow(*args: Any) -> Checkpoint:
        assert opened.wait(30)
        return real(*args)

    monkeypatch.setattr(checkpoint, "save", slow)
    return opened


def test_what_is_saved_is_the_state_at_that_step(
    tmp_path: Path, cfg: Config, state: TrainState, gate: threading.Event
) -> None:
    """Training goes on, and changes the weights, while they are written."""
    watched = Watched(tmp_path, cfg)
    before = {name: value.clone() for name, value in state.model.state_dict().items()}
    watched.save(state, 1)
    with torch.no_grad():
        for parameter in state.model.parameters():
            parameter.add_(1)
    assert watched.checkpointer.busy
    assert not watched.written
    gate.set()
    watched.checkpointer.finish(30)
    saved = watched.written[0].state()
    assert all(torch.equal(saved["model"][name], value) for name, value in before.items())


def test_one_is_written_at_a_time_and_the_next_waits(
    tmp_path: Path, cfg: Config, state: TrainState, gate: threading.Event
) -> None:
    watched = Watched(tmp_path, cfg)
    watched.save(state, 1)
    threading.Timer(0.5, gate.set).start()
    began = time.monotonic()
    watched.save(state, 2)
    assert time.monotonic() - began > 0.3
    watched.checkpointer.finish(30)
    assert [saved.step for saved in watched.written] == [1, 2]


def test_memory_for_the_copy_is_used_again(state: TrainState) -> None:
    one = to_host(state.state_dict(), None)
    places = [t.data_ptr() for t in one["model"].values()]
    with torch.no_grad():
        state.model.fc.weight.mul_(2)
    two = to_host(state.state_dict(), one)
    assert [t.data_ptr() for t in two["model"].values()] == places
    assert torch.equal(two["model"]["fc.weight"], state.model.fc.weight)
    assert two["model"]["fc.weight"].data_ptr() != state.model.fc.weight.data_ptr()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 300 MB: two checkpoints of ResNet-18 with momentum and EMA (128 MiB each) fit."""
    if os.geteuid() != 0:
        pytest.skip("mounting a file system needs root")
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300m", "tmpfs", str(folder)], check=False)
    if mounted.returncode:
        pytest.skip("this machine does not let root mount a tmpfs")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_told_and_tried_again(small_disk: Path, cfg: Config, state: TrainState) -> None:
    watched = Watched(small_disk, cfg)
    watched.save(state, 1)
    watched.checkpointer.finish(30)
    watched = Watched(small_disk, cfg)
    filler = small_disk / "filler"
    filler.write_bytes(bytes(100 * 2**20))
    watched.save(state, 2)
    wait_for(lambda: bool(watched.reports))
    assert re.search(r"step 2 cannot be written to .*, trying again: .*(No space left|MiB free)", watched.reports[0])
    assert not watched.checkpointer.busy
    assert checkpoint.newest_valid(Storage(small_disk), pytest.fail).step == 1  # type: ignore[union-attr]
    watched.save(state, 3)  # a newer one takes its place, and does not wait for it
    filler.unlink()
    watched.checkpointer.finish(30)
    assert watched.reports[-1].endswith("for which 1 before it gave way")
    assert [saved.step for saved in watched.written] == [3]
    assert watched.checkpointer.num_failed_tries >= 1
    assert sorted(p.name for p in small_disk.iterdir()) == ["step_00000001", "step_00000003"]


def test_on_a_disk_full_of_its_own_checkpoints_the_oldest_gives_way(
    small_disk: Path, cfg: Config, state: TrainState
) -> None:
    three = dataclasses.replace(cfg, checkpoint=dataclasses.replace(cfg.checkpoint, keep=3))
    watched = Watched(small_disk, three)
    for step in (1, 2, 3, 4):
        watched.save(state, step)
    watched.checkpointer.finish(60)
    assert [saved.step for saved in watched.written] == [1, 2, 3, 4]
    assert sorted(p.name for p in small_disk.iterdir()) == ["step_00000003", "step_00000004"]
    text = " ".join(watched.reports)
    assert "step_00000001 to make room for the checkpoint of step 3" in text
    assert "No space left on device" in text
    assert "the checkpoint of step 3 is written, after 1 tries that failed" in text


def test_a_failure_that_lasts_is_told_once_and_at_its_end(
    tmp_path: Path, cfg: Config, state: TrainState, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, fails = checkpoint.save, iter([True] * 5 + [False])

    def full(*args: Any) -> Checkpoint:
        if next(fails):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args)

    monkeypatch.setattr(checkpoint, "save", full)
    monkeypatch.setattr("pipeline.runs.async_checkpointer.backoff", lambda: itertools.repeat(0))
    watched = Watched(tmp_path, cfg)
    watched.save(state, 1)
    watched.checkpointer.finish(30)
    assert [re.sub(": .*", "", report) for report in watched.reports] == [
        f"the checkpoint of step 1 cannot be written to {watched.checkpointer._folder}, trying again",
        "the checkpoint of step 1 is written, after 5 tries that failed",
    ]


def test_an_outage_over_many_checkpoints_is_two_lines(
    tmp_path: Path, cfg: Config, state: TrainState, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though the text of the error has the name of each."""
    real, tries = checkpoint.save, list[int]()

    def full(folder: Storage, state: dict[str, Any], *args: Any) -> Checkpoint:
        tries.append(state["step"])
        if state["step"] < 9:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), f"/runs/.step_{state['step']:08d}.77/state.pt")
        return real(folder, state, *args)

    monkeypatch.setattr(checkpoint, "save", full)
    watched = Watched(tmp_path, cfg)
    for step in range(1, 10):
        watched.save(state, step)
        wait_for(lambda: step in tries)  # noqa: B023
    watched.checkpointer.finish(30)
    assert [saved.step for saved in watched.written] == [9]
    first, last = watched.reports
    assert "checkpoint of step 1 cannot be written" in first
    assert re.fullmatch(
        r"the checkpoint of step 9 is written, after \d+ tries .*, for which 8 before it gave way", last
    )


def test_a_flipped_bit_takes_no_place(tmp_path: Path, cfg: Config, state: TrainState) -> None:
    """Sizes do not tell of it, but that it was not gone on from: so many valid ones stay as are to."""
    watched = Watched(tmp_path, dataclasses.replace(cfg, checkpoint=dataclasses.replace(cfg.checkpoint, keep=4)))
    for step in (2, 4, 6, 8):
        watched.scores = {"top1": step / 10}
        watched.save(state, step)
    watched.checkpointer.finish(30)
    for saved in watched.written[2:]:
        content = bytearray(saved.file(checkpoint.STATE).read_bytes())
        content[len(content) // 2] ^= 1
        saved.file(checkpoint.STATE).write_bytes(content)
    (tmp_path / "step_of_someone").mkdir()
    for steps, left in (((5, 7), [4, 5, 6, 7, 8]), ((9, 11), [4, 6, 8, 9, 11])):  # two attempts; 4 is the best
        watched = Watched(tmp_path, cfg, checkpoint.newest_valid(Storage(tmp_path), lambda _: None))
        assert watched.checkpointer.damaged == [6, 8], "before the first one is written"
        for step in steps:
            watched.save(state, step)
        watched.checkpointer.finish(30)
        assert sorted(int(path.name[-8:]) for path in tmp_path.glob("step_0*")) == left
        best = watched.checkpointer.best("t")
        assert best is not None
        assert best.step == 4


def test_a_driver_that_was_superseded_makes_no_room(
    small_disk: Path, cfg: Config, state: TrainState, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its checkpoints are the other one's now, and the disk may be full because of that one."""
    watched = Watched(small_disk, dataclasses.replace(cfg, checkpoint=dataclasses.replace(cfg.checkpoint, keep=3)))
    for step in (1, 2):
        watched.save(state, step)
    watched.checkpointer.finish(60)

    def superseded() -> None:
        raise SupersededError("another driver")

    late = Watched(small_disk, cfg, check=superseded)
    late.save(state, 3)
    with pytest.raises(SupersededError):
        late.checkpointer.finish(30)
    assert sorted(p.name for p in small_disk.iterdir()) == ["step_00000001", "step_00000002"]


def test_giving_up_is_told_with_the_reason(
    tmp_path: Path, cfg: Config, state: TrainState, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(checkpoint, "save", broken)
    watched = Watched(tmp_path, cfg)
    watched.save(state, 1)
    with pytest.raises(TimeoutError, match=r"no checkpoint could be written to .* for 2 s: .*Input/output error"):
        watched.checkpointer.finish(2)


def test_a_long_wait_at_the_end_is_told(
    tmp_path: Path, cfg: Config, state: TrainState, gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.runs.async_checkpointer.QUIET_S", 0.1)
    watched = Watched(tmp_path, cfg)
    watched.save(state, 1)
    threading.Timer(0.5, gate.set).start()
    watched.checkpointer.finish(30)
    assert watched.reports == ["waiting up to 30 s for the checkpoint of step 1"]
    assert [saved.step for saved in watched.written] == [1]


def test_a_vanished_folder_is_waited_for_and_not_made_anew(tmp_path: Path, cfg: Config, state: TrainState) -> None:
    """As where a network file system is away: what is written to its empty mount point would be lost."""
    folder = tmp_path / "mounted"
    folder.mkdir()
    watched = Watched(folder, cfg)
    folder.rename(tmp_path / "away")
    watched.save(state, 1)
    wait_for(lambda: bool(watched.reports))
    assert not folder.exists()
    (tmp_path / "away").rename(folder)
    watched.checkpointer.finish(30)
    assert [saved.step for saved in watched.written] == [1]


def wait_for(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_one_that_hangs_is_a_failure(tmp_path: Path, cfg: Config, state: TrainState, gate: threading.Event) -> None:
    """Else training would go on for days without a checkpoint."""
    quick = dataclasses.replace(cfg, cluster=dataclasses.replace(cfg.cluster, timeout_s=10))
    watched = Watched(tmp_path, quick)
    watched.save(state, 1)
    watched.checkpointer._begun -= 11
    with pytest.raises(
        TimeoutError, match=r"writing the checkpoint of step 1 to .* takes longer than cluster.timeout_s=10"
    ):
        watched.save(state, 2)
    gate.set()
    watched.checkpointer.finish(30)


def test_scores_are_added_to_what_is_written(tmp_path: Path, cfg: Config, state: TrainState) -> None:
    """Once a step: to save it once more is nothing."""
    watched = Watched(tmp_path, cfg)
    watched.save(state, 1)
    watched.checkpointer.add_scores(1, {"top1": 0.5})
    watched.save(state, 1)
    watched.checkpointer.finish(30)
    assert [saved.top1 for saved in watched.written] == [None]
    assert watched.checkpointer.newest is not None
    assert watched.checkpointer.newest.top1 == 0.5
    found = checkpoint.newest_valid(Storage(tmp_path), pytest.fail)
    assert found is not None
    assert found.top1 == 0.5


def test_scores_that_could_not_be_written_are_made_up_for(
    tmp_path: Path, cfg: Config, state: TrainState, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The storage is away from the evaluation's end to the next checkpoint; the best must not be forgotten."""

    def away(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    watched, scored = Watched(tmp_path, cfg), list[Checkpoint]()
    monkeypatch.setattr(watched.checkpointer, "_scored", scored.append)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "with_scores", away)
        watched.save(state, 1)
        watched.checkpointer.add_scores(1, {"top1": 0.5})
        while watched.checkpointer.busy:
            time.sleep(0.01)
        assert scored == []
    for step in (2, 3, 4):  # two are kept, and the best
        watched.save(state, step)
    watched.checkpointer.finish(30)
    assert [(saved.step, saved.top1, saved.meta["best_top1"]) for saved in scored] == [(1, 0.5, 0.5)]
    top = retention.best_of(retention.own(Storage(tmp_path), None))
    assert top is not None
    assert top.step == 1
    assert watched.checkpointer.newest is not None
    assert watched.checkpointer.newest.step == 4


def test_scores_of_a_checkpoint_that_gave_way_are_left(
    tmp_path: Path, cfg: Config, state: TrainState, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    watched = Watched(tmp_path, cfg)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", full)
        watched.save(state, 1)
        while watched.checkpointer.busy:
            time.sleep(0.01)
        watched.checkpointer.add_scores(1, {"top1": 0.5})
    watched.save(state, 2)
    watched.checkpointer.finish(30)
    assert [(saved.step, saved.top1) for saved in watched.written] == [(2, None)]
