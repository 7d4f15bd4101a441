"""A place where `enumerate_faults` tries one case after the other, and what takes its user's part and the supervisor's.

Each process of a run is forked from one that has imported everything, and started again after a failure as the
supervisor and the driver do.
"""

import contextlib
import dataclasses
import faulthandler
import json
import os
import shutil
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import make_digits
import pyarrow.fs
import small_run
import torch
from fast_clock import RATE
from faults import HANGS, Fault
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
from small_run import STOP_AT, Place

from pipeline.data.indexing.build import build_index
from pipeline.events import AttemptStarted, CheckpointWritten, Event, from_json
from pipeline.failures import DriverEnd, FailureBudget, driver_is_replaced
from pipeline.runs.checkpoint import STATE
from pipeline.runs.spec import Failure as Failure
from pipeline.storage import Storage
from pipeline.versions import software

PARTS = (0, 1)
NUM_IMAGES = {"train": 4, "val": 2}  # of each digit
BOUND_S = 60.0  # of one process; of one that hangs, by the fast clock, twenty minutes:
HANGS_BOUND_S = 25.0
MAX_ATTEMPTS = 20
SLOW = "if a mount hangs, press Ctrl-C twice to stop"  # the driver says so


def forked(
    function: Callable[[], object], log: Path, bound_s: float = BOUND_S, given_up: Callable[[], bool] = lambda: False
) -> int | None:
    """The exit code (negative: the signal) of a process that calls `function`; None where it had to be killed."""
    pid = os.fork()
    if pid == 0:
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        faulthandler.enable(2)
        code = 1
        try:
            function()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    deadline = time.monotonic() + bound_s
    while time.monotonic() < deadline and not given_up():
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, signal.SIGABRT)  # faulthandler says where it stands
    time.sleep(0.3)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def prepare(folder: Path) -> None:
    """The images and an empty MLflow store, for all cases."""
    torch.set_num_threads(1)
    software()  # asks git and every package: once for all

    def make() -> None:
        make_digits.write(folder / "all")
        for split, number in NUM_IMAGES.items():
            for digit in (folder / "all" / split).iterdir():
                (folder / "data" / split / digit.name).mkdir(parents=True)
                for image in sorted(digit.iterdir())[:number]:
                    shutil.copy(image, folder / "data" / split / digit.name)
        build_index(folder / "data" / "train")[0].save(folder / "data" / "train.arrow")
        SqlAlchemyStore(f"sqlite:///{folder}/mlflow.db", str(folder))

    code = forked(make, folder / "log")
    assert code == 0, (folder / "log").read_text(encoding="utf-8")


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a command has ended.

    kind: done, told (in a line, before any step), failed, hangs, forgets (a checkpoint that was told as written).
    failures: survived.
    """

    kind: str
    text: str
    failures: int


class Slot:
    """All cases in it have the same paths.

    Args:
        folder: of all slots, as `prepare` has left it. storage: an object store's, or None for a folder of the slot.
    """

    def __init__(self, folder: Path, number: int, storage: Storage | None):
        self._empty, self._saved, case = folder / "mlflow.db", folder / f"saved{number}", folder / f"slot{number}"
        runs = storage / f"slot{number}" if storage else Storage(case / "runs")
        self.place = Place(case, folder / "data", runs, folder / f"control{number}")
        self._cfg = self.place.config()
        self._saved_step = 0  # as the user was told last

    def reset(self, part: int) -> None:
        """As it is before this part of the run."""
        self._saved_step = STOP_AT if part else 0
        place = self.place
        for folder in (place.folder, place.control):
            shutil.rmtree(folder, ignore_errors=True)
        place.control.mkdir()
        if part:
            shutil.copytree(self._saved / "case", place.folder, copy_function=_copy)
        else:
            place.tmp.mkdir(parents=True)
            place.database.parent.mkdir()
            shutil.copy(self._empty, place.database)
        if not place.storage.local:
            self._forked(lambda: self._reset_remote(part))

    def save(self) -> None:
        """Keep what the first part has left, for cases of the second one."""
        shutil.copytree(self.place.folder, self._saved / "case", copy_function=_copy)
        if not self.place.storage.local:
            self._forked(self._save_remote)

    def _reset_remote(self, part: int) -> None:
        system, path = self.place.storage._opened
        with contextlib.suppress(FileNotFoundError):
            system.delete_dir(path)
        if part:
            for file in (self._saved / "remote").rglob("*"):
                if file.is_file():
                    there = f"{path}/{file.relative_to(self._saved / 'remote')}"
                    pyarrow.fs.copy_files(str(file), there, pyarrow.fs.LocalFileSystem(), system)

    def _save_remote(self) -> None:
        (self._saved / "remote").mkdir()
        for name, _ in self.place.storage.walk():
            self.place.storage.download(name, self._saved / "remote" / name)

    def _forked(
        self, function: Callable[[], object], bound_s: float = BOUND_S, given_up: Callable[[], bool] = lambda: False
    ) -> int | None:
        return forked(function, self.place.control / "log", bound_s, given_up)

    def command(self, part: int, fault: Fault | None) -> Ended:
        """What `pipeline train` does: processes, until one gets to the end or must not be followed by another."""
        cfg = self._cfg
        if part == 0:
            cfg = dataclasses.replace(cfg, run=dataclasses.replace(cfg.run, stop_at_step=STOP_AT))
        budget, begun, faults = FailureBudget(cfg.cluster.max_failures), False, tuple[Failure, ...]()
        for failures in range(MAX_ATTEMPTS):
            again, before = failures > 0, begun

            def one() -> None:
                small_run.attempt(self.place, cfg, fault, again=again, begun=before, faults=faults)  # noqa: B023

            bound_s = HANGS_BOUND_S if fault and fault.kind == HANGS else BOUND_S
            code = self._forked(one, bound_s, lambda: not before and self._is_told_to_stop())  # noqa: B023
            self._end_hang()
            events = self._take_events()
            kind, text = self._result(code, heard=bool(events))
            if any(isinstance(event, AttemptStarted) for event in events):
                begun, faults = True, ()
            for event in events:
                if isinstance(event, AttemptStarted) and event.step < self._saved_step:
                    return Ended("forgets", f"begins at {event.step}, told of {self._saved_step}", failures)
                if isinstance(event, CheckpointWritten):
                    self._saved_step = max(self._saved_step, event.step)
                    budget.saved(event.step)
            if code is None:
                is_told = not before and any(SLOW in getattr(event, "text", "") for event in events)
                return Ended(*(("told", SLOW) if is_told else ("hangs", "nobody ends it")), failures)
            if kind == "done":
                return Ended("done", "", failures)
            if kind in get_args(DriverEnd) and not driver_is_replaced(kind, again or begun):
                return Ended("failed" if begun else "told", text, failures)
            if kind == "fatal" or budget.failed():
                return Ended("failed", f"{kind}: {text}", failures)
            time.sleep(budget.pause_s / RATE)
            steps = [event.step for event in events if hasattr(event, "step")]
            faults = (*faults, Failure(text, steps[-1] if steps else None, time.time()))
        raise AssertionError("it goes on for ever")

    def _result(self, code: int | None, *, heard: bool) -> tuple[Any, str]:
        file = self.place.control / "result.json"
        if not file.exists():  # it was killed, or its watchdog ended it
            return "lost" if heard or (code or 0) < 0 else "never started", f"exit code {code}"
        result = json.loads(file.read_text(encoding="utf-8"))
        file.unlink()
        return result["kind"], result["text"]

    def _is_told_to_stop(self) -> bool:
        """Whether the user is told that a mount may hang, and stops the command by a second Ctrl-C."""
        file = self.place.control / "events"
        return file.exists() and SLOW in file.read_text(encoding="utf-8")

    def _take_events(self) -> list[Event]:
        file = self.place.control / "events"
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        file.unlink(missing_ok=True)
        return [from_json(json.loads(line)) for line in lines]

    @property
    def _fault_times(self) -> tuple[float, float | None] | None:
        file = self.place.control / "clock.json"
        return tuple(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else None

    def _end_hang(self) -> None:
        """The clock goes as usual once the process that hung is gone."""
        if (times := self._fault_times) and times[1] is None:
            (self.place.control / "clock.json").write_text(json.dumps([times[0], time.time()]), encoding="utf-8")

    @property
    def was_disturbed(self) -> bool:
        return self._fault_times is not None

    def wait_for_minute(self) -> None:
        """A user who was told of something looks after it before the next command."""
        if (times := self._fault_times) and times[1]:
            time.sleep(max(0.0, times[1] - time.time()) + 1 / RATE)

    def operations(self) -> list[list[str]]:
        """Of the last process that was not killed: target and key."""
        return list(json.loads((self.place.control / "operations.json").read_text(encoding="utf-8")))

    def end(self) -> dict[str, Any]:
        """See `small_run.end`."""
        file = self.place.control / "end.json"
        code = self._forked(lambda: file.write_text(json.dumps(small_run.end(self.place)), encoding="utf-8"))
        return dict(json.loads(file.read_text(encoding="utf-8"))) if code == 0 else {"no end": "see the log"}


def _copy(source: str, to: str) -> None:
    """A checkpoint's state is replaced, and never changed, so that a link will do."""
    if source.endswith(STATE):
        os.link(source, to)
    else:
        shutil.copy2(source, to)
