"""Whole trainings as a user starts them, watched and hurt by tests."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch

from pipeline.runs import checkpoint
from pipeline.storage import Storage

ROOT = Path(__file__).parents[2]
# For a Python of its own that imports from a file of tests.
ENVIRON = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
BIN = Path(sys.executable).parent
PIPELINE = str(BIN / "pipeline")


class Training:
    """A command in a process group of its own; its output is read as it comes.

    Args:
        terminal: it has one to read from, at which somebody may press Ctrl-C.
    """

    def __init__(self, args: list[str], cwd: Path, env: dict[str, str] | None = None, *, terminal: bool = False):
        pipe = subprocess.PIPE
        environment = {**os.environ, **(env or {})}
        self._terminal = list(os.openpty()) if terminal else []
        self.process = subprocess.Popen(
            args,
            text=True,
            cwd=cwd,
            start_new_session=True,
            stdin=self._terminal[1] if terminal else subprocess.DEVNULL,
            stdout=pipe,
            stderr=pipe,
            env=environment,
        )
        self.out, self.err = list[str](), list[str]()
        streams = [(self.process.stdout, self.out), (self.process.stderr, self.err)]
        self._readers = [threading.Thread(target=self._read, args=pair, daemon=True) for pair in streams]
        for reader in self._readers:
            reader.start()

    @staticmethod
    def _read(stream: Any, lines: list[str]) -> None:
        lines.extend(iter(stream.readline, ""))

    @property
    def said(self) -> str:
        return "".join([*self.out, *self.err])

    def wait_for(self, pattern: str, timeout_s: float = 150) -> re.Match[str]:
        """Until a line of either stream matches."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if match := re.search(pattern, self.said, re.MULTILINE):
                return match
            if self.process.poll() is not None and not any(r.is_alive() for r in self._readers):
                break
            time.sleep(0.05)
        pytest.fail(f"no {pattern!r} in:\n{self.said[-5000:]}")

    def wait_for_step(self, step: int) -> None:
        self.wait_for(rf"^step {step}/")

    def signal_group(self, number: signal.Signals) -> None:
        os.killpg(self.process.pid, number)

    def finish(self, timeout_s: float = 240) -> int:
        """Wait for its end; the exit code."""
        code = self.process.wait(timeout_s)
        for reader in self._readers:
            reader.join(10)
        return code

    def find(self, pattern: str) -> list[int]:
        """The processes below it whose command line contains `pattern`."""
        return [pid for pid in descendants(self.process.pid) if pattern in command_line(pid)]

    def kill(self) -> None:
        """Whatever is left of it."""
        started = descendants(self.process.pid)
        for pid in [self.process.pid, *started] if self.process.poll() is None else started:
            kill(pid)
        self.finish(10)
        for stream in (self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()
        for descriptor in self._terminal:
            os.close(descriptor)


Start = Callable[..., Training]
Run = Callable[..., tuple[int, str, str]]  # of a command's words: exit code, stdout, stderr


@contextmanager
def trainings(cwd: Path) -> Iterator[Start]:
    """Starts trainings; what still runs of them at the end is killed."""
    started: list[Training] = []

    def start(args: list[str], env: dict[str, str] | None = None, *, terminal: bool = False) -> Training:
        started.append(Training(args, cwd, env, terminal=terminal))
        return started[-1]

    try:
        yield start
    finally:
        for training in started:
            training.kill()


def kill(pid: int, number: signal.Signals = signal.SIGKILL) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return  # it ended by itself


def descendants(pid: int) -> list[int]:
    """The processes that `pid` started, and theirs."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:  # it ended meanwhile
            continue
    found, frontier = [], [pid]
    while frontier:
        frontier = [child for child, parent in parents.items() if parent in frontier]
        found += frontier
    return found


def command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def state_of(run: Path | Storage) -> dict[str, Any]:
    """The newest checkpoint's, all of whose checkpoints must be sound."""
    found = checkpoint.newest_valid(Storage(str(run)) / "checkpoints", pytest.fail)
    assert found is not None
    return found.state()


def differences(a: Any, b: Any, place: str = "") -> list[str]:
    """Where two nested states are not bitwise equal."""
    if isinstance(a, torch.Tensor):
        return [] if a.dtype == b.dtype and torch.equal(a, b) else [place]
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        return [d for key in a for d in differences(a[key], b[key], f"{place}.{key}")]
    if isinstance(a, list):
        assert len(a) == len(b)
        return [d for i, (x, y) in enumerate(zip(a, b, strict=True)) for d in differences(x, y, f"{place}[{i}]")]
    return [] if a == b else [place]


def loss_series(uri: str, run: str) -> list[tuple[int, float]]:
    """(step, loss) of a run, by its name, in the order in which MLflow got them."""
    return [(m.step, m.value) for m in history(uri, run, "train/loss")]


def history(uri: str, run: str, metric: str) -> list[Any]:
    """What MLflow has of a metric of a run, by the run's name."""
    client = mlflow.MlflowClient(uri)
    experiment = client.get_experiment_by_name("pipeline")
    assert experiment is not None
    (found,) = client.search_runs([experiment.experiment_id], f"attributes.run_name = '{run}'")
    return list(client.get_metric_history(found.info.run_id, metric))
