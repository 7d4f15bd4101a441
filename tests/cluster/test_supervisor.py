"""The process that the user starts: what a driver leaves behind is no trouble of the user's."""

import errno
import itertools
import os
import re
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import mlflow
import psutil
import pytest

from pipeline import machine
from pipeline.cluster import connection, controller, driver, ending, oom, ray_start, supervisor
from pipeline.config.loading import load
from pipeline.config.schema import Config
from pipeline.errors import UserError
from pipeline.events import AttemptFailed, AttemptStarted, BrokenImage, Event, RunOpened, Warned
from pipeline.failures import ClusterLostError, FailureBudget, Interrupted, TrainingFailedError
from pipeline.runs.claim import Claim
from pipeline.runs.manifest import RunManifest
from pipeline.storage import Storage
from pipeline.training import open_run


def test_a_process_that_has_just_ended_by_itself_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the result of a training that ended well would be lost in a traceback, once in a while."""
    child = subprocess.Popen(["true"])
    seen = psutil.Process(child.pid)
    child.wait()
    monkeypatch.setattr(psutil.Process, "children", lambda self, recursive: [seen])
    machine.kill_descendants(set())


@pytest.mark.parametrize(
    ("library", "how", "log"),
    [
        ("ray", "the driver ended with exit code 1: ", True),
        ("omegaconf", "", True),
        ("torch", "a worker cannot start: ", False),
    ],
)
def test_what_cannot_start_is_not_tried_again(
    library: str, how: str, log: bool, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its error, or its log's last line, is the message: a broken installation is broken the next time, too."""
    (tmp_path / f"{library}.py").write_text("raise ImportError('a.so: bad ELF header')\n", encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    cfg = load(None, [f"data.{split}={digits / split}" for split in ("train", "val")] + [f"run.storage={tmp_path}"])
    events: list[Event] = []
    with pytest.raises(TrainingFailedError) as told:
        supervisor.train(cfg, "x", None, events.append)
    said, _, place = str(told.value).partition(" (log: ")
    assert said == f"{how}ImportError: a.so: bad ELF header"
    assert [event for event in events if isinstance(event, AttemptFailed)] == []
    if log:
        Path(place.rstrip(")")).unlink()


def test_what_the_kernel_killed_for_memory_is_told_as_that(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = iter([3, 3, 4, 4])
    monkeypatch.setattr(machine, "out_of_memory_kills", lambda: next(counts))
    kills = oom.OutOfMemoryKills()
    assert kills.explain("worker 0 failed") == "worker 0 failed"
    assert re.match(r"the kernel has killed a process .* \d+\.\d GB; worker 1 failed", kills.explain("worker 1 failed"))
    assert kills.explain("worker 2 failed") == "worker 2 failed"


@pytest.mark.parametrize(
    ("errors", "calls", "message"),
    [
        ([Exception("The current node timed out during startup.\nThis")], 2, None),
        ([TimeoutError("a"), RuntimeError("b")], 3, None),
        ([TimeoutError("a")] * 3, 3, "Ray did not start on this machine in 3 tries: TimeoutError: a"),
        ([ValueError("no such hook")], 1, "Ray did not start on this machine in 1 tries: ValueError: no such hook"),
    ],
)
def test_ray_is_started_again_where_it_was_too_slow(errors: list[Exception], calls: int, message: str | None) -> None:
    """And what the slow start left behind is ended first."""
    left: list[subprocess.Popen[bytes]] = []
    warnings: list[str] = []

    def start() -> None:
        assert all(process.poll() is not None for process in left)
        left.append(subprocess.Popen(["sleep", "100"]))
        if len(left) <= len(errors):
            raise errors[len(left) - 1]

    try:
        with pytest.raises(ray_start.RayStartError, match=message) if message else nullcontext():
            ray_start.start_with_retries(start, warnings.append, threading.Event())
    finally:
        for process in left:
            process.kill()
            process.wait()
    assert len(left) == calls
    assert len(warnings) == calls - 1
    assert all(text.startswith("Ray did not start (") and text.endswith("); trying again") for text in warnings)


def test_more_threads_than_cores_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads that share a core wait for each other at each barrier."""
    node = SimpleNamespace(kill_all_processes=lambda **_: None)
    monkeypatch.setattr(ray_start, "start_with_retries", lambda *_: node)
    monkeypatch.setattr(machine, "cpu_count", lambda: 4)
    told = list[str]()
    for settings in (["workers=2", "cpus_per_worker=2"], ["workers=8"], ["workers=2", "cpus_per_worker=3"]):
        cfg = load(None, [f"cluster.{setting}" for setting in settings] + ["data.train=x", "data.val=x"])
        with connection._local_cluster(cfg.cluster, told.append, threading.Event(), lambda: None):
            pass
    (text,) = told
    assert text.startswith("cluster.cpus_per_worker=3: 6 threads wait for each other on 4 cores")
    assert text.endswith("set cluster.cpus_per_worker=2")


def test_the_end_of_a_worker_is_told_without_rays_words() -> None:
    """As Ray 2.60 says it."""
    died = "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: "
    died += "Worker unexpectedly exits with a connection error code 2. End of file."
    advice = " Some common causes include: (1) the process was killed by the OOM killer\nsee the log"
    lost = "The actor is dead because its node has died. Node Id: 0123456789abcdef"
    raised = "Traceback (most recent call last):\n  File x\nValueError: too many\n"
    for said, crash, told in (
        (died + advice, None, "worker 1 was killed, or exited without an error message"),
        (died + advice, "Bus error", "worker 1 was killed by signal 7 (SIGBUS: bus error)"),
        (died + advice, "Out of luck", "worker 1 crashed: Out of luck"),
        (raised, "Segmentation fault", "worker 1 failed: ValueError: too many"),  # of a child that it outlived
        (lost, None, "worker 1 is lost with its node, which died or was cut off"),
        (raised, None, "worker 1 failed: ValueError: too many"),
    ):
        assert connection.how_it_ended(1, RuntimeError(said), crash) == told


def test_a_log_that_somebody_removed_is_missed_by_nobody(tmp_path: Path) -> None:
    """As those do who clean /tmp of a machine that has been up for weeks."""
    assert supervisor._last_line(tmp_path / "gone.log") == ""


def test_an_ignored_hang_up_stays_ignored_and_other_signals_are_heard() -> None:
    """`nohup pipeline train ... &` in a script, whose background jobs ignore SIGINT, and the terminal is closed."""
    before = {s: signal.signal(s, signal.SIG_IGN) for s in (signal.SIGHUP, signal.SIGINT)}
    before[signal.SIGTERM] = signal.getsignal(signal.SIGTERM)
    try:
        with supervisor._signals() as received:
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGINT)
            assert received == ["SIGINT"]
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize("at_terminal", [False, True])
def test_only_a_second_ctrl_c_at_a_terminal_stops_at_once(monkeypatch: pytest.MonkeyPatch, at_terminal: bool) -> None:
    monkeypatch.setattr(supervisor, "_at_terminal", lambda: at_terminal)
    before = {s: signal.getsignal(s) for s in supervisor.ENDING_SIGNALS}
    raised, after = False, before[signal.SIGTERM]
    try:
        try:
            with supervisor._signals() as received:
                for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGTERM, signal.SIGINT):
                    os.kill(os.getpid(), number)
                assert received == ["SIGTERM", "SIGHUP", "SIGTERM", "SIGINT"]
                os.kill(os.getpid(), signal.SIGINT)
        except Interrupted:
            raised = True
        after = signal.getsignal(signal.SIGTERM)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert raised == at_terminal
    assert after is signal.SIG_IGN, "the next one does not kill what is about to end"


class FakeController:
    def __init__(self, *_: object, **__: object):
        pass


def other_end(cfg: Config, told: list[str], *, trained: bool) -> driver.SupervisorConnection:
    """The other end of a driver that has been asked to train."""
    request = supervisor.TrainRequest(cfg, None, FailureBudget(3), (), trained, trained, 0.0)
    made = SimpleNamespace(request=request, wants_stop=threading.Event(), warn=told.append, emit=lambda _: None)
    return cast(driver.SupervisorConnection, made)


@pytest.mark.parametrize(
    ("trained", "late", "outcome"), [(True, 3, None), (True, 99, "lost"), (False, 1, "user error")]
)
def test_what_was_right_before_is_waited_for_by_a_later_driver(
    trained: bool, late: int, outcome: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A data mount that comes up after the node; at a first start it is the user's mistake."""
    tries = iter(range(100))

    def prepare(*_: object, **__: object) -> AbstractContextManager[str]:
        if next(tries) < late:
            raise UserError("data.train=/mnt/x: no folder or index file")
        return nullcontext("a job")

    monkeypatch.setattr(open_run, "open_run", prepare)
    monkeypatch.setattr(controller, "TrainController", FakeController)
    pause = 0.01 if outcome is None else 11.0
    monkeypatch.setattr(driver, "backoff", lambda: itertools.repeat(pause))
    cfg = load(None, ["data.train=x", "data.val=x", "cluster.timeout_s=10"])
    told, opened = list[str](), list[object]()
    error = {"lost": ClusterLostError, "user error": UserError, None: None}[outcome]
    refused = nullcontext() if error is None else pytest.raises(error, match="no folder or index file")
    with refused, driver._opened(other_end(cfg, told, trained=trained), lambda: None) as (job, _):
        opened.append(job)
    assert (opened, len(told)) == ((["a job"], 1) if outcome is None else ([], 0))
    assert all(text.endswith("this worked earlier in this training, so it is tried again") for text in told)


def test_a_driver_that_hung_is_told_as_that(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text('ray: started\nTimeout (0:10:10)!\nThread 0x1 (most recent call first):\n  File "x.py"\n')
    assert supervisor._last_line(log) == "it hung, and left its stacks there"


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("", "it said nothing more, as where Ray's raylet on this machine has died"),
        ("RuntimeError: no\n", "RuntimeError: no"),
    ],
)
def test_the_end_of_a_driver_is_not_told_in_words_of_rays_log(tmp_path: Path, said: str, told: str) -> None:
    log = tmp_path / "log"
    log.write_text(f"{said}[2026-11-30 09:57:43,790 E 11025 11238] core_worker.cc:609: :info_message: Attempting to\n")
    assert supervisor._last_line(log) == told


def test_a_later_driver_begins_nothing_in_an_empty_mount_point(tmp_path: Path) -> None:
    cfg = load(None, [f"data.train={tmp_path}/x", f"data.val={tmp_path}/x", f"run.storage={tmp_path}", "run.name=x"])
    with pytest.raises(UserError, match="checkpoint of step 4 is missing"):
        open_run.open_run(cfg, print, has_trained=True, saved_step=4).__enter__()
    assert not (tmp_path / "x/run.json").exists()


def test_a_storage_that_fails_at_the_start_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    cfg = load(None, [f"data.train={tmp_path}/x", f"data.val={tmp_path}/x", f"run.storage={tmp_path}", "run.name=x"])
    monkeypatch.setattr(open_run, "is_index", fails)
    with pytest.raises(UserError, match=r"data.train=.*/x: its index cannot be made or read \(Input/output error\)"):
        open_run.open_run(cfg, print).__enter__()
    monkeypatch.setattr(open_run, "run_lock", fails)
    with pytest.raises(UserError, match=r"run.storage=.*: cannot be used \(Input/output error\); name another place"):
        open_run.open_run(cfg, print).__enter__()


@pytest.mark.parametrize(("device", "kept"), [("cuda", "gpu"), ("cpu", "cpu")])
def test_a_later_driver_trains_on_the_device_of_the_first(
    device: str, kept: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A head that is back before its GPU nodes would train on its CPU, to the end."""
    asked = list[tuple[str, bool]]()

    def run(
        request: supervisor.TrainRequest, _: object, note: Callable[[Event], None], __: object
    ) -> tuple[str, object]:
        asked.append((request.cfg.cluster.device, request.has_trained))
        note(AttemptStarted(1, 0, 9, 4, None, 1, 1, device, "fp32", "", {}, 0))
        return ("lost", "the cluster") if len(asked) == 1 else ("done", {})

    monkeypatch.setattr(supervisor, "_run_driver", run)
    supervisor.train(load(None, ["data.train=x", "data.val=x"]), "x", None, lambda _: None)
    assert asked == [("auto", False), (kept, True)]


def test_a_broken_image_is_named_once_whoever_meets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks do, and the attempts of a second driver."""
    ends: Iterator[tuple[str, object]] = iter([("lost", "the driver was killed"), ("done", {})])

    def run(_: object, __: object, handle: Callable[[Event], None], ___: object) -> tuple[str, object]:
        handle(AttemptStarted(1, 0, 9, 4, None, 2, 1, "cpu", "fp32", "", {}, 0))
        for file in ("a.jpg", "b.jpg", "a.jpg"):
            handle(BrokenImage(file, "it is short"))
        return next(ends)

    monkeypatch.setattr(supervisor, "_run_driver", run)
    events = list[Event]()
    supervisor.train(load(None, ["data.train=x", "data.val=x"]), "x", None, events.append)
    assert [event.path for event in events if isinstance(event, BrokenImage)] == ["a.jpg", "b.jpg"]


@pytest.mark.parametrize("error", [TrainingFailedError("one failure too many"), Interrupted("a signal")])
def test_a_failure_that_mlflow_cannot_be_told_of_stays_that_failure(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the run's storage away, too; else a new driver would start, again and again."""

    class Failing(FakeController):
        def run(self, *_: object) -> None:
            raise error

    def away(*_: object) -> None:
        raise OSError("the storage is away")

    here = SimpleNamespace(run=SimpleNamespace(name="x"), attempts=0)
    monkeypatch.setattr(driver, "connected", lambda *_: nullcontext())
    monkeypatch.setattr(ending, "_tell_end", away)
    monkeypatch.setattr(controller, "TrainController", Failing)
    monkeypatch.setattr(open_run, "open_run", lambda *_, **__: nullcontext(here))
    told = list[str]()
    one = other_end(load(None, ["data.train=/", "data.val=/"]), told, trained=False)
    with pytest.raises(type(error), match=str(error)):
        driver.train(one)
    assert told == ["run.json and MLflow are not told: the storage is away"]


@pytest.mark.parametrize("is_other_command", [False, True])
@pytest.mark.parametrize(("max_failures", "status"), [(0, "FAILED"), (1, "KILLED")])
def test_a_lost_driver_leaves_no_run_open(
    is_other_command: bool, max_failures: int, status: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """MLflow would show it as running for ever; but where another command has begun, it is that one's.

    There may be no next driver, or one that hears of Ctrl-C before it has opened the run.
    """
    run, ends = Storage(tmp_path / "runs/x"), iter([("lost", "the driver was killed"), ("interrupted", None)])
    run.make()

    def ended(request: supervisor.TrainRequest, _: object, note: Callable[[Event], None], __: object) -> object:
        if not request.restarted:
            note(RunOpened("x", str(run)))
            Claim.take(run, request.command)
            RunManifest(attempts=1, open=True).write(run)
            note(AttemptStarted(1, 0, 9, 4, None, 1, 1, "cpu", "fp32", "", {}, 0))
        if is_other_command:
            Claim.take(run, "other")
        return next(ends)

    monkeypatch.setattr(supervisor, "_run_driver", ended)
    monkeypatch.setattr(supervisor, "_wait", lambda *_: None)
    settings = [f"cluster.max_failures={max_failures}", f"run.storage={tmp_path}/runs"]
    events = list[Event]()
    with pytest.raises(TrainingFailedError if status == "FAILED" else Interrupted):
        supervisor.train(load(None, ["data.train=x", "data.val=x", *settings]), "x", None, events.append)
    left = RunManifest.read(run, pytest.fail)
    assert left is not None
    assert left.open == is_other_command
    assert left.failure == ("the driver was killed" if status == "FAILED" and not is_other_command else "")
    told = [event.text for event in events if isinstance(event, Warned)]
    if is_other_command:
        assert told == [f"run.json and MLflow are not told: another command has begun to train {run}; this one ends"]
        return
    assert told == []
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/runs/mlflow.db")
    (one,) = client.search_runs([e.experiment_id for e in client.search_experiments()])
    assert one.info.status == status
    assert one.data.tags.get("pipeline.failure") == ("the driver was killed" if status == "FAILED" else None)


def test_a_storage_that_hangs_does_not_keep_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ending, "DRIVER_END_S", 0.2)
    release, told = threading.Event(), list[str]()
    monkeypatch.setattr(RunManifest, "read", lambda *_: release.wait(60) and None)
    ending.tell_for_driver(load(None, ["data.train=x", "data.val=x"]), "/x", "y", Interrupted(), told.append)
    release.set()
    assert told == ["run.json and MLflow are not told: that takes longer than 0.2 s"]


def test_a_mistyped_path_is_told_before_ray_starts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(driver, "connected", lambda *_: pytest.fail("it takes seconds"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    (tmp_path / "train").mkdir()
    for data, line in (
        (
            [f"data.train={tmp_path}/trian", f"data.val={tmp_path}/train"],
            "data.train: no folder or index file .*/trian",
        ),
        (
            [f"data.train={tmp_path}/train", f"data.val={tmp_path}/val"],
            "data.val: no folder or index file .*/val; give",
        ),
    ):
        with pytest.raises(UserError, match=line):
            driver.train(other_end(load(None, data), [], trained=False))
