"""What a training takes of a small machine besides its steps, this tree beside another one, by turns.

    python scripts/bench_machine.py --against /path/to/another/checkout [--rounds 3] [--out FILE.json]

Per round and tree, on ResNet-152 as in the demo, with two workers: seconds from the command to the end of the first
step; CPU time over a minute of all processes but the workers; seconds from a worker's death to the end of the next
step. Then images/s of ResNet-18 in fp32 (64 pixels, batch 32, one worker with all cores), alone and beside as many busy
processes as there are cores. Both trees run in this Python environment. The machine must be quiet: what else runs
counts against both.
"""

import argparse
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parent.parent
RUN = """
import sys
try:
    from pipeline.cli.app import main
except ImportError:  # an older version
    from pipeline.cli import main
sys.argv[0] = "pipeline"
sys.exit(main())
"""
DEMO = ["train.log_every=1", "cluster.workers=2", "train.precision=fp32"]
SMALL = ["model.depth=18", "data.image_size=64", "data.val_resize=64", "train.global_batch=32", "cluster.workers=1"]
SMALL += ["train.precision=fp32", "train.log_every=5", "train.eval_every=1000"]
WARM_LINES = 2  # of the progress, before its images/s count
ROWS = {
    "first_step_s": "command to first step, s",
    "idle_cpu": "CPU of all but the workers, share of a core",
    "recovery_s": "worker killed to next step, s",
    "alone": "ResNet-18 alone, images/s",
    "crowded": "beside busy processes, images/s",
    "kept": "share of its speed that it keeps beside them",
}


class Training:
    """A training of a tree, as a user starts it; its lines come with the time."""

    def __init__(self, tree: Path, folder: str, settings: Sequence[str]):
        data = [f"data.{split}={ROOT}/data/digits/{split}" for split in ("train", "val")]
        quiet = ["mlflow.log_model=false", "mlflow.report=false", f"run.storage={folder}", "train.epochs=100"]
        words = [sys.executable, "-c", RUN, "train", "configs/digits.yaml", *data, *quiet, *settings]
        self.began = time.monotonic()
        self.process = subprocess.Popen(
            words,
            cwd=tree,
            env={**os.environ, "PYTHONPATH": str(tree)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.lines: list[tuple[float, str]] = []
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append((time.monotonic(), line))

    def wait_for(self, pattern: str, after: float = 0.0, number: int = 1) -> float:
        """When the `number`th line that matches came, of those after a time."""
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline and self.process.poll() is None:
            times = [t for t, line in self.lines if t > after and re.search(pattern, line)]
            if len(times) >= number:
                return times[number - 1]
            time.sleep(0.02)
        raise RuntimeError(f"no {pattern!r} in:\n{''.join(line for _, line in self.lines)}")

    def others(self) -> dict[int, float]:
        """CPU seconds of each process but the workers."""
        found = {}
        me = psutil.Process(self.process.pid)
        for process in [me, *me.children(recursive=True)]:
            if "RayTrainWorker" not in " ".join(process.cmdline()):
                found[process.pid] = sum(process.cpu_times()[:2])
        return found

    def workers(self) -> list[psutil.Process]:
        children = psutil.Process(self.process.pid).children(recursive=True)
        return [child for child in children if "RayTrainWorker" in " ".join(child.cmdline())]

    def end(self) -> None:
        for _ in range(2):
            self.process.send_signal(signal.SIGINT)
            time.sleep(0.5)
        self.process.wait(60)


@contextmanager
def busy(number: int) -> Iterator[None]:
    """So many processes that compute all the time."""
    started = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(number)]
    try:
        time.sleep(2)
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def of_demo(tree: Path, seconds: float) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        training = Training(tree, folder, DEMO)
        first = training.wait_for(r"^step 1/") - training.began
        time.sleep(5)
        before = training.others()
        time.sleep(seconds)
        after = training.others()
        idle = sum(after[pid] - before[pid] for pid in after.keys() & before.keys()) / seconds
        killed = time.monotonic()
        training.workers()[0].kill()
        recovered = training.wait_for(r"^step \d+/", training.wait_for(r"(attempt|session) 2", killed)) - killed
        training.end()
    return {"first_step_s": first, "idle_cpu": idle, "recovery_s": recovered}


def of_small(tree: Path, seconds: float) -> float:
    with tempfile.TemporaryDirectory() as folder:
        training = Training(tree, folder, SMALL)
        warm = training.wait_for(r"^step \d+/", number=WARM_LINES)
        time.sleep(seconds)
        rates = [re.search(r"(\d+) images/s", line) for t, line in training.lines if t > warm]
        training.end()
    return statistics.median(int(rate[1]) for rate in rates if rate)


def measure(tree: Path, seconds: float) -> dict[str, float]:
    result = of_demo(tree, seconds)
    alone = of_small(tree, seconds / 4)
    with busy(len(os.sched_getaffinity(0))):
        crowded = of_small(tree, seconds / 2)
    return result | {"alone": alone, "crowded": crowded, "kept": crowded / alone}


def spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.3g} ({min(values):.3g} to {max(values):.3g})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, required=True, metavar="TREE", help="another checkout")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=60.0, help="over which CPU time is counted")
    parser.add_argument("--out", type=Path, metavar="FILE", help="for all figures, as JSON")
    args = parser.parse_args()
    trees = {"this": ROOT.resolve(), "other": args.against.resolve()}
    rounds: list[dict[str, Any]] = []
    for number in range(args.rounds):
        order = list(trees) if number % 2 == 0 else list(reversed(trees))
        rounds.append({name: measure(trees[name], args.seconds) for name in order})
        print(json.dumps(rounds[-1]), file=sys.stderr, flush=True)
    print("| what | this tree | the other | ratio |\n| --- | --- | --- | --- |")
    for key, text in ROWS.items():
        mine, other = ([one[name][key] for one in rounds] for name in ("this", "other"))
        ratios = spread([a / b for a, b in zip(mine, other, strict=True)])
        print(f"| {text} | {spread(mine)} | {spread(other)} | {ratios} |")
    if args.out:
        args.out.write_text(json.dumps(rounds, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
