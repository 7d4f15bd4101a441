"""One of the loaders that `pipeline bench loader` compares, in a process of its own.

All are pinned to the same cores and idle while another is measured: they share no interpreter lock, allocator or
thread pool.
"""

import multiprocessing
import os
import signal
import time
from multiprocessing.connection import Connection
from typing import NamedTuple

import psutil
import torch

from pipeline.bench.loader_baselines import LoaderBaseline, Task

IDLE_TIMEOUT_S = 120.0  # for a loader to fall idle after its round


class Speed(NamedTuple):
    """Images by time passed, and by the CPU time of all its processes, on which others' load has little influence."""

    per_s: float
    per_cpu_s: float


class LoaderProcess:
    """A loader in its process, which works in its own rounds alone."""

    def __init__(self, baseline: LoaderBaseline, task: Task):
        self.baseline = baseline
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_run_loader, args=(baseline, task, theirs))
        allowed = os.sched_getaffinity(0)
        os.sched_setaffinity(0, task.cores)  # inherited, also by the threads that start with an import
        try:
            self._process.start()
        finally:
            os.sched_setaffinity(0, allowed)
        theirs.close()

    def run_round(self) -> Speed:
        """Work one round.

        Raises:
            RuntimeError: the process has died; its own error is on stderr.
        """
        try:
            self._pipe.send(None)
            speed: Speed = self._pipe.recv()
        except (EOFError, ConnectionError):
            raise RuntimeError(f"the loader {self.baseline.name!r} has failed, see above") from None
        return speed

    def end(self) -> None:
        self._pipe.close()
        self._process.join(10)
        self._process.kill()
        self._process.join()


def _run_loader(baseline: LoaderBaseline, task: Task, pipe: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's affair, which closes the pipe
    torch.set_num_threads(len(task.cores))
    batches, process = baseline.batches(baseline, task), psutil.Process()
    while True:
        try:
            pipe.recv()
        except EOFError:
            return
        for _ in range(baseline.num_ahead(task)):
            next(batches)
        started, used = time.perf_counter(), _cpu_seconds(process)
        num_images = sum(len(next(batches)) for _ in range(task.num_batches))
        seconds, cpu_seconds = time.perf_counter() - started, _cpu_seconds(process) - used
        _wait_until_idle(process)
        pipe.send(Speed(num_images / seconds, num_images / max(cpu_seconds, 0.01)))  # which is told in 10 ms


def _wait_until_idle(process: psutil.Process) -> None:
    """Wait until what is made ahead is made, so that the next loader has the cores for itself."""
    deadline = time.monotonic() + IDLE_TIMEOUT_S
    used, before = _cpu_seconds(process), -1.0
    while used - before > 0.02:
        if time.monotonic() > deadline:
            raise RuntimeError(f"still at work {IDLE_TIMEOUT_S:.0f} s after its round")
        time.sleep(0.2)
        before, used = used, _cpu_seconds(process)


def _cpu_seconds(process: psutil.Process) -> float:
    return float(sum(sum(p.cpu_times()[:2]) for p in [process, *process.children(recursive=True)]))
