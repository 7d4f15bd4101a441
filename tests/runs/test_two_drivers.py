"""Whole drivers on one object store, in random orders of their calls, each of which may be a process's last one."""

import random
import re
import threading
import traceback
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from interleaving import Turns, in_memory

from pipeline.config.loading import load
from pipeline.errors import UserError
from pipeline.failures import TrainingFailedError
from pipeline.runs import checkpoint, resume, retention
from pipeline.runs.checkpoint import newest_valid
from pipeline.runs.claim import FOLDER, Claim, SupersededError
from pipeline.runs.manifest import RunManifest
from pipeline.runs.spec import RunSpec
from pipeline.storage import Storage
from pipeline.training import open_run

CALLS = ("names", "sizes", "read_bytes", "write_bytes", "upload", "download", "delete", "remove")
CFG = load(None, ["data.train=x", "data.val=x"])
LAST_STEP, KEEP, MAX_ATTEMPTS = 4, 2, 20


def quiet(_: str) -> None:
    """What one driver has half written, another one tells of."""


class Died(BaseException):
    """A process, between two of its calls."""


class World:
    """Drivers of two commands on one run; what is promised is looked at between any two of their calls.

    Args:
        seed: of the order, and of who dies where.
    """

    def __init__(self, seed: int, folder: Path, monkeypatch: pytest.MonkeyPatch):
        self._random, self._folder, self._patch = random.Random(seed), folder, monkeypatch
        self._run = RunSpec(CFG, Storage("s3://run"), "", "").run
        self._told, self._last = 0, 0  # the step of the newest checkpoint that somebody was told of; whose turn it is
        self.ends: dict[str, str] = {}
        self.num_deaths = 0

    def go(self) -> None:
        with self._patch.context() as patch:
            patch.setattr("pipeline.storage.scratch_folder", lambda: self._folder / threading.current_thread().name)
            in_memory(patch, turns := Turns(self._choose, self._look), CALLS)
            before_call = turns.before_call

            def may_die() -> None:
                before_call()
                if threading.current_thread() is not threading.main_thread() and self._random.random() < 0.02:
                    self.num_deaths += 1
                    raise Died

            patch.setattr(turns, "before_call", may_die)
            turns.run([partial(self._command, "first"), partial(self._command, "second")])
            self._look_at_the_end()

    def _choose(self, ready: list[int]) -> int:
        """Mostly on with the same one, so that each gets far, too, while the other stands still."""
        if self._last not in ready or self._random.random() < 0.1:
            self._last = self._random.choice(ready)
        return self._last

    def _command(self, name: str) -> None:
        """As the supervisor does, in whose place a user is who gives the command again."""
        for attempt in range(MAX_ATTEMPTS):
            try:
                self._driver(name, again=attempt > 0)
            except Died:
                continue
            except (SupersededError, TrainingFailedError, UserError) as e:
                self.ends[name] = str(e)
            except Exception:
                self.ends[name] = traceback.format_exc()
            else:
                self.ends[name] = "done"
            return
        self.ends[name] = "it dies too often"

    def _driver(self, name: str, *, again: bool) -> None:
        """What `runs.prepare`, `fit` and `Recorder` do, in their order."""
        run, folder = self._run, self._run / "checkpoints"
        looked, found = resume.find_checkpoint(run, None, quiet, verify_state=False)
        with open_run._as_second(run, reclaims=again):
            claim = Claim.take(run, name, reclaims=again)
            open_run._settled(run, looked, claim, None, None, quiet)
        saved_step = found.step if found else 0
        manifest, found = resume.find_checkpoint(run, None, quiet, claim=claim, saved_step=saved_step)
        manifest = manifest.replaced(manifest.begin(0), run, claim)
        assert found is None or found.state()["weights"].tolist() == [found.step] * 3
        for step in range(found.step + 1 if found else 1, LAST_STEP + 1):
            # On GPUs not the same bits, even with as many workers.
            state = {"step": step, "weights": torch.full((3,), step), "attempt": claim.name}
            meta: dict[str, Any] = {"fingerprint": "", "classes": [], "metrics": {}, **manifest.facts()}
            saved = checkpoint.save(folder, state, CFG, meta, lambda: manifest.check(run, claim))
            self._told = max(self._told, saved.step)
            retention.prune(folder, KEEP, manifest.training_id, saved.step)
        manifest.replaced(manifest.end(), run, claim)

    def _look(self) -> None:
        found = newest_valid(self._run / "checkpoints", lambda _: None)
        assert (found.step if found else 0) >= self._told, "a checkpoint that was told is no more"

    def _look_at_the_end(self) -> None:
        last = max((self._run / FOLDER).names()).split("-")[1]
        assert self.ends.pop(last) == "done", "the later one does not win"
        for text in self.ends.values():
            assert text == "done" or re.search("this one ends|another command begins to train it just now", text), text
        manifest = RunManifest.read(self._run, quiet)
        assert manifest is not None
        assert not manifest.open
        own = retention.own(self._run / "checkpoints", manifest.training_id)
        assert [c.step for c in own][-KEEP:] == [LAST_STEP - 1, LAST_STEP], "what is kept"
        for one in own:
            assert checkpoint.load(one.place).state()["weights"].tolist() == [one.step] * 3


@pytest.mark.parametrize("seed", range(24))
def test_of_two_drivers_the_later_one_wins_and_nothing_told_is_lost(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    World(seed, tmp_path, monkeypatch).go()
