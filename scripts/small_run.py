"""The training that `enumerate_faults` disturbs: its two parts, each a command of a user's, and what must come of it.

Takes the place of the supervisor, and of Ray: the driver's preparation and the one rank's work are one process here,
forked from one that has imported everything, and started again after a failure as the supervisor and the driver do.
"""

import contextlib
import dataclasses
import faulthandler
import hashlib
import json
import os
import shutil
import signal
import sqlite3
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import make_digits
import mlflow.store.tracking.sqlalchemy_store  # imported once, and not in each case
import mlflow.system_metrics.system_metrics_monitor
import pyarrow.fs
import torch
import torch._dynamo  # an optimizer imports it, which takes two seconds
from faults import Fault, Seam
from fast_clock import RATE, Clock

from pipeline import checkpoint, runs, tracking
from pipeline.config import Config, ConfigError
from pipeline.data.build import build_index
from pipeline.identity import Identity
from pipeline.job import Context, Event, FailureBudget, Job
from pipeline.job import Fault as Failure
from pipeline.provenance import software
from pipeline.saver import Saver
from pipeline.settings import load
from pipeline.storage import Storage, pauses
from pipeline.train import fit

ROOT = Path(__file__).parent.parent
PARTS = (0, 1)
NUM_IMAGES = {"train": 4, "val": 2}  # of each digit
STOP_AT, NUM_STEPS = 4, 8
KEPT = ("step_00000004", "step_00000008")  # in any case: the best and the last
SETTINGS = f"""run.name=small model.depth=18 model.freeze=layer4 train.steps={NUM_STEPS} train.global_batch=10
    train.precision=fp32 train.log_every=2 train.eval_batch=10 optim.warmup_epochs=0.1 checkpoint.every=2
    checkpoint.keep=2 mlflow.log_model=false mlflow.report=false cluster.workers=1 cluster.timeout_s=120
    data.image_size=16 data.val_resize=16 data.read_threads=1 data.decode_threads=1""".split()
BOUND_S = 60.0  # of one process; of one that hangs under the fast clock so many seconds are ten minutes and more:
HANGS_BOUND_S = 15.0
SAVE_BOUND_S = 1.5
FATAL = {"FatalError", "ConfigError", "NonFiniteError", "BadDataError", "CheckpointError", "SupersededError"}
VARYING = ("perf/", "time/", "checkpoint/", "session/", "system/")  # metrics whose values are another in each run


def is_fatal(error: BaseException) -> bool:
    """Whether a worker tells its driver that another attempt would meet the same."""
    return bool(FATAL & {kind.__name__ for kind in type(error).__mro__})


def forked(function: Callable[[], object], log: Path, bound_s: float = BOUND_S) -> int | None:
    """The exit code (negative: the signal) of a process that calls `function`; None where it had to be killed."""
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(out, 1)
            os.dup2(out, 2)
            faulthandler.enable(2)
            try:
                function()
                os._exit(0)
            except BaseException:
                traceback.print_exc()
        os._exit(1)
    deadline = time.monotonic() + bound_s
    while time.monotonic() < deadline:
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
        mlflow.store.tracking.sqlalchemy_store.SqlAlchemyStore(f"sqlite:///{folder}/mlflow.db", str(folder))

    code = forked(make, folder / "log")
    assert code == 0, (folder / "log").read_text(encoding="utf-8")


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a command has ended. kind: done, told (in a line, before any step), failed, hangs. failures: survived."""

    kind: str
    text: str
    failures: int


class Slot:
    """A place where one case after the other is tried; all have the same paths.

    Args:
        folder: of all slots, as `prepare` has left it. storage: an object store's, or None for a folder of the slot.
    """

    def __init__(self, folder: Path, number: int, storage: Storage | None):
        self._data, self._empty, self._remote = folder / "data", folder / "mlflow.db", storage
        self._case, self._saved = folder / f"slot{number}", folder / f"saved{number}"
        self.control = folder / f"control{number}"  # what the harness keeps, out of the seam's sight
        self._storage = storage / f"slot{number}" if storage else Storage(self._case / "runs")
        self.run = self._storage / "small"
        given = [f"run.storage={self._storage}", f"data.train={self._data}/train.arrow", f"data.val={self._data}/val"]
        given.append(f"mlflow.uri=sqlite:///{self._case}/mlflow/mlflow.db")
        self._cfg = load(ROOT / "configs/digits.yaml", [*SETTINGS, *given])

    def reset(self, part: int) -> None:
        """As it is before this part of the run."""
        for folder in (self._case, self.control):
            shutil.rmtree(folder, ignore_errors=True)
        self.control.mkdir()
        if part:
            shutil.copytree(self._saved / "case", self._case, copy_function=_link_states)
        else:
            (self._case / "tmp").mkdir(parents=True)
            (self._case / "mlflow").mkdir()
            shutil.copy(self._empty, self._case / "mlflow")
        if self._remote:
            self.forked(lambda: self._reset_remote(part))

    def save(self) -> None:
        """Keep what the first part has left, for cases of the second one."""
        shutil.copytree(self._case, self._saved / "case", copy_function=_link_states)
        if self._remote:
            self.forked(self._save_remote)

    def _reset_remote(self, part: int) -> None:
        system, path = self._storage._opened
        with contextlib.suppress(FileNotFoundError):
            system.delete_dir(path)
        if part:
            pyarrow.fs.copy_files(str(self._saved / "remote"), path, pyarrow.fs.LocalFileSystem(), system)

    def _save_remote(self) -> None:
        system, path = self._storage._opened
        (self._saved / "remote").mkdir()
        pyarrow.fs.copy_files(path, str(self._saved / "remote"), system, pyarrow.fs.LocalFileSystem())

    def forked(self, function: Callable[[], object], bound_s: float = BOUND_S) -> int | None:
        return forked(function, self.control / "log", bound_s)

    def command(self, part: int, fault: Fault | None) -> Ended:
        """What `pipeline train` does: processes, until one gets to the end or must not be followed by another."""
        budget, begun, faults = FailureBudget(self._cfg.cluster.max_failures), False, tuple[Failure, ...]()
        for attempt in range(20):
            result = self.control / "result.json"
            result.unlink(missing_ok=True)
            again, known, trained = attempt > 0, faults, begun
            bound_s = HANGS_BOUND_S if fault and fault.kind == "hangs" else BOUND_S
            code = self.forked(lambda: self._attempt(part, fault, again, trained, known), bound_s)  # noqa: B023
            self._end_hang()
            told = json.loads(result.read_text(encoding="utf-8")) if result.exists() else {}
            kind, text = told.get("kind", "died"), told.get("text", f"exit code {code}")
            events = self._take_events()
            if any(event["kind"] == "start" for event in events):
                begun, faults = True, ()
            if any(event["kind"] == "checkpoint" for event in events):
                budget.progressed()
            if code is None:
                return Ended("hangs", "nobody ends it", attempt)
            if kind == "done":
                return Ended("done", "", attempt)
            if kind == "wrong" or (kind == "broken" and not (again or begun)):
                return Ended("failed" if begun else "told", text, attempt)
            if kind == "fatal" or budget.failed():
                return Ended("failed", text, attempt)
            steps = [event["step"] for event in events if "step" in event]
            faults = (*faults, Failure(text, steps[-1] if steps else None, time.time()))
        raise AssertionError("it goes on for ever")

    def _end_hang(self) -> None:
        file = self.control / "clock.json"
        if file.exists() and json.loads(file.read_text(encoding="utf-8"))[1] is None:
            since, _ = json.loads(file.read_text(encoding="utf-8"))
            file.write_text(json.dumps([since, time.time()]), encoding="utf-8")

    def wait_for_minute(self) -> None:
        """A user who was told of something looks after it before the next command."""
        file = self.control / "clock.json"
        if file.exists():
            time.sleep(max(0.0, json.loads(file.read_text(encoding="utf-8"))[1] - time.time()) + 1 / RATE)

    def _take_events(self) -> list[Event]:
        file = self.control / "events"
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        file.unlink(missing_ok=True)
        return [json.loads(line) for line in lines]

    def operations(self) -> list[tuple[str, str]]:
        """Of the last process that was not killed."""
        return [(t, k) for t, k in json.loads((self.control / "operations.json").read_text(encoding="utf-8"))]

    def _attempt(self, part: int, fault: Fault | None, again: bool, trained: bool, faults: tuple[Failure, ...]) -> None:
        """One process: the driver's preparation, and the rank's work."""
        tempfile.tempdir = str(self._case / "tmp")
        remote = self.run._opened[1] if self._remote else str(self.run)
        roots = {remote: ("RUN", "storage"), str(Path(remote).parent): ("RUNS", "storage")}
        roots |= {str(self._case / "tmp"): ("TMP", "scratch"), str(self._data): ("DATA", "data")}
        sink = os.open(self.control / "events", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        result, operations = (self.control / f"{name}.json" for name in ("result", "operations"))
        clock = Clock(self.control / "clock.json")
        clock.install()
        _settle_saves(clock)
        seam = Seam(roots, fault, clock)
        seam.install()

        def emit(event: Event) -> None:
            os.write(sink, json.dumps(event, default=str).encode() + b"\n")
            if event["kind"] == "warning":
                print("warning:", event["text"], flush=True)

        cfg = self._cfg
        if part == 0:
            cfg = dataclasses.replace(cfg, run=dataclasses.replace(cfg.run, stop_at_step=STOP_AT))
        told: dict[str, Any] = {}
        try:
            with _opened(cfg, trained, emit) as job:
                began = (("command", clock.time()), ("run", clock.time()))
                context = Context(0, 1, torch.device("cpu"), 1, emit, faults=faults, marks=began, restarted=again)
                try:
                    fit(job, context)
                    told["kind"] = "done"
                except Exception as e:
                    traceback.print_exc()
                    told |= {"kind": "fatal" if is_fatal(e) else "failed", "text": f"{type(e).__name__}: {e}"}
        except ConfigError as e:
            traceback.print_exc()
            told |= {"kind": "wrong", "text": str(e)}
        except Exception as e:
            traceback.print_exc()
            told |= {"kind": "broken", "text": f"{type(e).__name__}: {e}"}
        result.write_text(json.dumps(told), encoding="utf-8")
        operations.write_text(json.dumps(seam.operations), encoding="utf-8")

    def end(self) -> dict[str, Any]:
        """What came of it, after `pipeline sync` where something waits for MLflow."""
        file = self.control / "end.json"
        code = self.forked(lambda: file.write_text(json.dumps(self._end()), encoding="utf-8"))
        return dict(json.loads(file.read_text(encoding="utf-8"))) if code == 0 else {"end": "cannot be read, see log"}

    def _end(self) -> dict[str, Any]:
        tempfile.tempdir = str(self._case / "tmp")
        identity = Identity.read(self.run, print)
        ended = identity is not None and not identity.open
        _, _, waiting = tracking.sync(self.run.scratch / "mlflow", print, ended=ended)
        newest = checkpoint.newest_valid(self.run / "checkpoints", print)
        assert newest is not None
        digest = hashlib.sha256()
        _digest(newest.state(), digest)
        store = sqlite3.connect(self._case / "mlflow" / "mlflow.db")
        rows = store.execute("select key, step, value from metrics where key not like 'system/%' order by key, step")
        metrics: dict[str, Any] = {}
        for key, step, value in rows:
            metrics.setdefault(key, []).append([step, None if key.startswith(VARYING) else value])
        artifacts = {path.relative_to(self._case).as_posix() for path in self._case.glob("mlflow/mlartifacts/*/*/**/*")}
        return {
            "run.json": ended,
            "waiting": waiting,
            "checkpoints": (self.run / "checkpoints").names(),
            "weights": digest.hexdigest(),
            "runs": store.execute("select status from runs").fetchall(),
            "metrics": metrics,
            "artifacts": sorted(Path(*Path(path).parts[4:]).as_posix() for path in artifacts if "session" not in path),
        }


@contextlib.contextmanager
def _opened(cfg: Config, trained: bool, watch: Callable[[Event], None]) -> Iterator[Job]:
    """As the driver's: what is refused to a training that has begun is waited for."""
    deadline = time.monotonic() + cfg.cluster.timeout_s
    with contextlib.ExitStack() as stack:
        for pause in pauses():
            try:
                job = stack.enter_context(runs.prepare(cfg, watch))
                break
            except ConfigError as e:
                if not trained:
                    raise
                if time.monotonic() + pause > deadline:
                    raise RuntimeError(str(e)) from None  # the cluster counts as lost: another driver is to try
            time.sleep(pause)
        yield job


def _settle_saves(clock: Clock) -> None:
    """Have each save wait until it is done: how fast a disk is must not choose the steps that are saved."""
    save = Saver.save

    def settled(saver: Saver, *args: Any) -> None:
        save(saver, *args)
        began = clock._monotonic()
        while saver._writing and not saver._writing.done():
            if clock.since is not None and clock._monotonic() - began > SAVE_BOUND_S:
                break
            clock._sleep(0.005)

    Saver.save = settled  # type: ignore[method-assign]


def _link_states(source: str, to: str) -> object:
    """A checkpoint's state is replaced, and never changed."""
    return os.link(source, to) if source.endswith(checkpoint.STATE) else shutil.copy2(source, to)


def _digest(value: Any, into: Any) -> None:
    if isinstance(value, torch.Tensor):
        into.update(value.contiguous().numpy().tobytes())
    elif isinstance(value, dict):
        for key in sorted(value, key=str):
            into.update(str(key).encode())
            _digest(value[key], into)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _digest(item, into)
    else:
        into.update(repr(value).encode())
