"""Programs that take turns on one machine: each runs for a window of time while the others are frozen by SIGSTOP.

A shared machine's speed swings by a third within minutes, so whatever is to be compared must run within seconds of each
other, and runs that last minutes cannot be started again each time. Only the processes that do the work are
frozen; those that answer heartbeats live on. How far a program is, is read from a file to which it appends a JSON
line with "time" (the monotonic clock, which all processes of a machine share) at each step.
"""

import json
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

POLL_S = 0.05
STALLED_S = 300.0  # without the steps that a window needs
PATIENCE_S = 90.0  # for an end in peace: ours saves a checkpoint
STOPPED = (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE)


class StalledError(RuntimeError):
    """A program has died or stands still; the text ends with what it said last."""


@dataclass(frozen=True)
class Program:
    """How a program is started, and where it tells of its steps.

    worker: what the command lines of the processes below it that do the work have in them.
    """

    name: str
    args: Sequence[str]
    worker: str
    env: Mapping[str, str]
    progress: Path
    log: Path


class Running:
    """A program that runs, frozen between its turns."""

    def __init__(self, program: Program):
        self.program = program
        with program.log.open("w", encoding="utf-8") as log:
            self._process = subprocess.Popen(
                program.args, env=dict(program.env), stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        self._tree = psutil.Process(self._process.pid)

    def warm_up(self, num_steps: int) -> None:
        """Run until so many steps are done, and freeze."""
        self._until(lambda: len(self.times()) >= num_steps)
        self.freeze()

    def window(self, seconds: float, num_steps: int) -> list[float]:
        """Run for so long, and on until so many steps are done.

        Returns:
            When each step of the window was done.

        Raises:
            StalledError: it was not done in five minutes more.
        """
        known = len(self.times())
        end = time.monotonic() + seconds
        self.thaw()
        self._until(lambda: time.monotonic() >= end and len(self.times()) - known >= num_steps)
        self.freeze()
        return self.times()[known:]

    def times(self) -> list[float]:
        """When each step so far was done."""
        if not self.program.progress.exists():
            return []
        *lines, _ = self.program.progress.read_text(encoding="utf-8").split("\n")  # the last one may be half written
        return [json.loads(line)["time"] for line in lines]

    def freeze(self) -> None:
        """Stop all that work; returns when they stand still."""
        workers = self._signal(signal.SIGSTOP)
        deadline = time.monotonic() + STALLED_S
        while not all(_status(p) in STOPPED for p in workers):
            if time.monotonic() > deadline:
                raise self._stalled("does not stop")
            time.sleep(POLL_S)

    def background_cpu_s(self) -> float:
        """The CPU time so far of its processes that are never frozen."""
        return sum(_cpu_s(p) for p in self._all() if not self._does_work(p))

    def thaw(self) -> None:
        self._signal(signal.SIGCONT)

    def end(self) -> None:
        """End all its processes, in peace if that is done in time."""
        tree = self._all()
        self.thaw()
        if self._process.poll() is None:
            self._process.terminate()
        _, alive = psutil.wait_procs(tree, PATIENCE_S)
        for process in alive:
            _send(process, signal.SIGKILL)
        psutil.wait_procs(alive, 10)
        self._process.wait()

    def _until(self, done: Callable[[], bool]) -> None:
        deadline = time.monotonic() + STALLED_S
        while not done():
            if self._process.poll() is not None:
                raise self._stalled(f"has ended with code {self._process.returncode}")
            if time.monotonic() > deadline:
                raise self._stalled(f"has not done its steps in {STALLED_S:g} s")
            time.sleep(POLL_S)

    def _stalled(self, why: str) -> StalledError:
        said = self.program.log.read_text(encoding="utf-8", errors="replace")[-3000:]
        return StalledError(f"{self.program.name} {why}; {self.program.log} ends with:\n{said}")

    def _all(self) -> list[psutil.Process]:
        try:
            return [self._tree, *self._tree.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def _does_work(self, process: psutil.Process) -> bool:
        return process.pid != self._process.pid and self.program.worker in _command(process)

    def _signal(self, number: signal.Signals) -> list[psutil.Process]:
        workers = [p for p in self._all() if self._does_work(p)]
        for process in workers:
            _send(process, number)
        return workers


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""  # it has ended


def _cpu_s(process: psutil.Process) -> float:
    try:
        return float(sum(process.cpu_times()[:2]))
    except psutil.NoSuchProcess:
        return 0.0


def _status(process: psutil.Process) -> str:
    try:
        return str(process.status())
    except psutil.NoSuchProcess:
        return str(psutil.STATUS_ZOMBIE)


def _send(process: psutil.Process, number: signal.Signals) -> None:
    with suppress(psutil.NoSuchProcess):
        process.send_signal(number)


def race(
    running: Sequence[Running],
    num_rounds: int,
    seconds: float,
    num_steps: int,
    done: Callable[[int, dict[str, list[float]]], None],
) -> dict[str, list[list[float]]]:
    """Let them take turns, another first in each round.

    Args:
        num_steps: at the least in each window.
        done: told each round's windows.

    Returns:
        When the steps of each window were done, by program and round.
    """
    windows: dict[str, list[list[float]]] = {r.program.name: [] for r in running}
    for i in range(num_rounds):
        first = i % len(running)
        for r in [*running[first:], *running[:first]]:
            windows[r.program.name].append(r.window(seconds, num_steps))
        done(i, {name: ones[-1] for name, ones in windows.items()})
    return windows
