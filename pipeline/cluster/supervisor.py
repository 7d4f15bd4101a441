"""The process that the user starts: it keeps a driver running, and shows what happens.

The driver is a process of its own, since Ray ends its process when it loses its cluster. When it dies, a new
one goes on from the newest checkpoint. When this process dies, the driver saves a checkpoint and ends.
"""

import ctypes
import dataclasses
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil

from pipeline import clock, machine
from pipeline.cluster.oom import OutOfMemoryKills, require_memory
from pipeline.config.schema import Config
from pipeline.environment import driver_environment
from pipeline.errors import UserError
from pipeline.events import (
    AttemptFailed,
    AttemptStarted,
    BrokenImage,
    CheckpointWritten,
    CrashingImageFound,
    Event,
    Note,
    RunOpened,
    Stopping,
    Warned,
)
from pipeline.failures import (
    DRIVER_END_S,
    DriverEnd,
    FailureBudget,
    Interrupted,
    TrainingFailedError,
    driver_is_replaced,
)
from pipeline.runs.spec import Failure
from pipeline.text import last_telling_line, signal_in_words

ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
POLL_S = 0.5
# A thread that waits for another one spins, which costs nothing where each has its core. Beside others that compute, it
# takes the core from the one that it waits for. Giving it up at once costs a fifth where nobody else wants it.
BUSY = "other programs use these CPU cores, so waiting threads yield them; set OMP_WAIT_POLICY=ACTIVE to keep them"
FROM_OUTSIDE = (signal.SIGKILL, *ENDING_SIGNALS)  # a process does not do that to itself
PR_SET_CHILD_SUBREAPER = 36  # <linux/prctl.h>


@dataclasses.dataclass(frozen=True)
class TrainRequest:
    """What a driver is to do.

    budget: of failures, as far as it is used up. failures: since the last attempt began. restarted: an earlier driver
    had begun. has_trained: so had workers, so that the configuration is right. began: the user's command, Unix time.
    command: a name of its own.
    """

    cfg: Config
    resume_from: str | None
    budget: FailureBudget
    failures: tuple[Failure, ...]
    restarted: bool
    has_trained: bool
    began: float
    command: str = ""


def train(
    cfg: Config, label: str, resume_from: str | None, emit: Callable[[Event], None], *, began: float | None = None
) -> dict[str, Any]:
    """Run a training and wait for its end.

    SIGINT, SIGTERM or SIGHUP: checkpoint, then return a summary with status "interrupted".

    Args:
        label: what a run without a name is called, before the time.
        resume_from: path or URI of a checkpoint to begin with, where the run has none.
        emit: called with each event in turn, in this thread.
        began: the user's command, Unix time; None: now.

    Returns:
        The summary that rank 0's `fit` returns.

    Raises:
        UserError: the data, the cluster or a checkpoint does not fit the configuration.
        TrainingFailedError: it failed more often than cluster.max_failures allows, or for good.
        Interrupted: a second Ctrl-C came at a terminal, or a signal while no attempt ran.
    """
    name = cfg.run.name or f"{label}-{time.strftime('%Y%m%d-%H%M%S')}"
    cfg = dataclasses.replace(cfg, run=dataclasses.replace(cfg.run, name=name))
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # Ray's processes stay findable when a driver dies
    budget, step, began = FailureBudget(cfg.cluster.max_failures), 0, began or time.time()
    joins = bool(cfg.cluster.address or os.environ.get("RAY_ADDRESS"))
    if not joins:
        require_memory(cfg.cluster.min_workers)
    environment, notes = driver_environment(os.environ, starts_ray=not joins)
    for text in notes:
        emit(Warned(text))
    if not joins and clock.OTHER_LOAD.is_high() and "OMP_WAIT_POLICY" not in environment:
        environment["OMP_WAIT_POLICY"] = "PASSIVE"
        emit(Note(BUSY))
    failures: tuple[Failure, ...] = ()
    kills, has_trained, broken, place = OutOfMemoryKills(), False, set[str](), ""

    def handle(event: Event) -> None:
        nonlocal cfg, step, failures, has_trained, place
        step = getattr(event, "step", step)
        match event:
            case AttemptFailed(text):
                event = AttemptFailed(kills.explain(text))
                budget.failed()  # the driver decides what comes of it
            case RunOpened():
                place = event.place
            case CheckpointWritten():
                budget.saved(event.step)
            case BrokenImage():  # each rank and each attempt meets it
                if event.path in broken:
                    return
                broken.add(event.path)
            case CrashingImageFound():
                broken.add(event.path)
                budget.forgive()
            case AttemptStarted():
                failures, has_trained = (), True
                budget.started(event.step)
                # It belongs to the training: a head that is back before its GPUs is no reason to go on without them.
                cluster = dataclasses.replace(cfg.cluster, device="gpu" if event.device == "cuda" else "cpu")
                cfg = dataclasses.replace(cfg, cluster=cluster)
        emit(event)

    def tell(error: TrainingFailedError | Interrupted) -> None:
        from pipeline.cluster.ending import tell_for_driver  # late: it takes a second

        tell_for_driver(cfg, place, command, error, lambda text: emit(Warned(text)))

    with _signals() as received:
        restarted, command = False, uuid.uuid4().hex
        while True:
            request = TrainRequest(cfg, resume_from, budget, failures, restarted, has_trained, began, command)
            end, content = _run_driver(request, environment, handle, received)
            if end == "done":
                return dict(content)
            if end == "user error":
                raise UserError(content)
            if end == "interrupted":
                if restarted and has_trained:  # a driver that ends before it opens the run tells nobody
                    tell(Interrupted())
                raise Interrupted
            content = kills.explain(content)
            if not driver_is_replaced(end, restarted or has_trained) or budget.failed():
                error = TrainingFailedError(content)
                if has_trained and end != "failed":  # which the driver has told
                    tell(error)
                raise error
            restarted = True
            failures = (*failures, Failure(content, step, time.time()))
            emit(AttemptFailed(content))
            _wait(budget.pause_s, received)


def _wait(seconds: float, received: list[str]) -> None:
    """Until then, or until a signal has come."""
    deadline = time.monotonic() + seconds
    while not received and time.monotonic() < deadline:
        time.sleep(POLL_S)


def _run_driver(
    request: TrainRequest, environment: Mapping[str, str], handle: Callable[[Event], None], received: list[str]
) -> tuple[DriverEnd, Any]:
    """Start a driver and attend to it; how it ended, and its summary or the reason."""
    ours, theirs = Pipe()
    command = [sys.executable, "-m", "pipeline.cluster.driver", str(theirs.fileno())]
    end: DriverEnd | None = None
    not_ours = set(psutil.Process().children(recursive=True))
    # Ray says there what a user has no use for, as long as all goes well.
    with tempfile.NamedTemporaryFile(prefix="pipeline-driver-", suffix=".log", delete=False) as log:
        try:
            with _blocked(ENDING_SIGNALS):
                process = subprocess.Popen(
                    command,
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=environment,
                )
            theirs.close()
            with suppress(BrokenPipeError):  # it has ended already: see there
                ours.send(request)
            end, content = _attend(ours, process, Path(log.name), handle, received)
        finally:
            machine.kill_descendants(not_ours)
            keep = end in ("lost", "internal error", "never started")
            if not keep:
                Path(log.name).unlink(missing_ok=True)  # whoever cleans /tmp may have been there
    return end, f"{content} (log: {log.name})" if keep else content


def _attend(
    driver: Connection,
    process: "subprocess.Popen[bytes]",
    log: Path,
    handle: Callable[[Event], None],
    received: list[str],
) -> tuple[DriverEnd, Any]:
    is_told_to_stop = heard = False
    while True:
        try:
            if driver.poll(POLL_S):
                kind, content = driver.recv()
                heard = True
                if kind != "event":
                    with suppress(subprocess.TimeoutExpired):  # all is said; what hangs is killed
                        process.wait(DRIVER_END_S)
                    return kind, content
                handle(content)
            if received and not is_told_to_stop:
                is_told_to_stop = True
                handle(Stopping(received[0]))
                driver.send("stop")
        except (EOFError, OSError):
            code = process.wait()
            how = f"was killed by {signal_in_words(-code)}" if code < 0 else f"ended with exit code {code}"
            if -code in FROM_OUTSIDE:
                return "lost", f"the driver {how}"
            last = _last_line(log)
            return "lost" if heard else "never started", f"the driver {how}{last and f': {last}'}"


def _last_line(log: Path) -> str:
    """What a process said of its end: of a traceback, the error."""
    try:
        said = log.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:  # whoever cleans /tmp was there
        return ""
    hung = any(line.strip().startswith("Timeout (") for line in said.splitlines())  # `watchdog`
    if hung:
        return "it hung, and left its stacks there"
    return last_telling_line(said) or "it said nothing more, as where Ray's raylet on this machine has died"


@contextmanager
def _blocked(signals: Iterable[signal.Signals]) -> Iterator[None]:
    """Keep signals from the processes started inside, which inherit the mask.

    `kill`, `timeout` and batch systems may signal the whole process group; the driver and Ray must live until
    the workers have saved a checkpoint. Ray does the same for SIGINT.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _at_terminal() -> bool:
    """Whether somebody sits there; a closed descriptor is none."""
    return any(map(os.isatty, (0, 1, 2)))


@contextmanager
def _signals() -> Iterator[list[str]]:
    """Collects the names of signals to end, for the main loop to act on the first; a second Ctrl-C raises Interrupted.

    Whoever sends others may send them again, and means the same: where a RayJob is deleted, KubeRay stops the job and
    then the pod, within seconds.

    An ignored SIGHUP, as `nohup` has it, stays ignored. Not so SIGINT, which shells have their background jobs ignore:
    who sends that to one means it.
    """
    received: list[str] = []

    def handle(number: int, frame: Any) -> None:
        if number == signal.SIGINT and signal.SIGINT.name in received and _at_terminal():
            raise Interrupted
        received.append(signal.Signals(number).name)

    heard = [s for s in ENDING_SIGNALS if s != signal.SIGHUP or signal.getsignal(s) is not signal.SIG_IGN]
    previous = {s: signal.signal(s, handle) for s in heard}
    try:
        yield received
    finally:
        for number, handler in previous.items():  # what comes once more, while this process ends, means the same
            is_said = received and (number != signal.SIGINT or not _at_terminal())
            signal.signal(number, signal.SIG_IGN if is_said else handler)
