"""Whole trainings side by side on a CPU: ours, the loops that people use, and what the bare step would give.

    python scripts/bench_peers.py [--case resnet152|resnet50] [--rounds 9] [--out DIR] [--json]

torchvision: its reference loop under torchrun with DataLoader and PIL. timm: its model, loader and optimizer. pipeline:
`pipeline train` through Ray, with MLflow on SQLite and checkpoints. fit: the same without Ray and MLflow. ceiling: our
step on one batch that lies ready, with the same ranks. Same images, global batch, precision, cores. All run at once
and take turns (see turns.py); what counts are the ratios within a round. Before, each one's settings are tried out, by
turns likewise, and the best of them races. Ray's own processes are never frozen: the share of the cores that they take
slows the others too, so ratios to the others are lessened by it. Ends with 1 where an aim is missed.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import make_photos
import torch
from peer import LABEL_SMOOTHING, LR, Peer
from peers_report import AIMS, CEILING, FIT, OURS, fastest, steps_per_s, summarise, table
from turns import Program, Running, race

from pipeline.bench.common import describe_machine
from pipeline.machine import cpu_count
from pipeline.training.precision import decide, emulation, hardware_of

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / "configs" / "imagenet" / "resnet152.yaml"  # the plain recipe; the depth is set
WARM_UP = 3  # steps
RANK, RAY_WORKER = "peer.py", "ray::RayTrainWorker"  # in the command lines of what is frozen
PACKAGES = ("torch", "torchvision", "timm", "pillow", "nvidia-dali-cuda130", "ray", "mlflow")


@dataclass(frozen=True)
class Case:
    """What all contestants train. window: seconds, at the least. checkpoint_every: steps, ours."""

    depth: int
    size: int
    batch: int
    window: float
    checkpoint_every: int
    precision: str = "auto"


CASES = {"resnet152": Case(152, 64, 32, 20.0, 40), "resnet50": Case(50, 224, 16, 30.0, 40)}


@dataclass(frozen=True)
class Setting:
    """How a contestant runs. workers: of torch's DataLoader, for each rank."""

    ranks: int = 1
    workers: int | None = None
    channels_last: bool = True
    fused: bool = True

    def __str__(self) -> str:
        texts = [f"{self.ranks} ranks of {num_cores() // self.ranks} threads"]
        if self.workers is not None:
            order, kind = "on" if self.channels_last else "off", "fused" if self.fused else "foreach"
            texts += [f"num_workers={self.workers}", f"channels_last {order}", f"{kind} SGD"]
        return ", ".join(texts)


BEST_GUESS = {"torchvision": Setting(workers=1), "timm": Setting(workers=1), OURS: Setting()}


def num_cores() -> int:
    return cpu_count()


class Bench:
    """Starts contestants in a folder of their own, and ends what it started.

    background: the share of the cores that each one's processes that are never frozen took in the last race.
    """

    def __init__(self, case: Case, photos: Path, folder: Path, num_ahead: int, warm_up_s: float):
        self.case, self._photos, self._folder = case, photos, folder
        self._num_ahead, self._warm_up_s = num_ahead, warm_up_s
        self._num_started, self.background = 0, dict[str, float]()

    def race(
        self, entries: Sequence[tuple[str, str, Setting]], num_rounds: int, seconds: float
    ) -> dict[str, list[list[float]]]:
        """The windows of each (label, kind, setting), by label; a first round, in which all warm up, is left out."""
        with ExitStack() as started:
            running = []
            for label, kind, setting in entries:
                one = Running(self._program(label, kind, setting))
                started.callback(one.end)
                one.warm_up(WARM_UP)
                one.window(self._warm_up_s, 0)  # MLflow and others go on starting beside the first steps
                running.append(one)

            def done(number: int, windows: dict[str, list[float]]) -> None:
                figures = [f"{n} {self.images_per_s(times):.1f}" for n, times in windows.items()]
                _say(f"round {number} of {num_rounds}, images/s: {'; '.join(figures)}")

            before, began = self._background(running), time.monotonic()
            windows = race(running, num_rounds + 1, seconds, self._num_ahead + 3, done)
            passed = (time.monotonic() - began) * num_cores()
            self.background = {name: (cpu - before[name]) / passed for name, cpu in self._background(running).items()}
            return {name: ones[1:] for name, ones in windows.items()}

    def _background(self, running: Sequence[Running]) -> dict[str, float]:
        return {r.program.name: r.background_cpu_s() for r in running}

    def images_per_s(self, times: Sequence[float]) -> float:
        return steps_per_s(times, self._num_ahead) * self.case.batch

    def choose(self, kind: str, num_rounds: int, seconds: float) -> tuple[Setting, list[dict[str, Any]]]:
        """The best setting of a contestant, and what the trials said."""
        trials: list[dict[str, Any]] = []

        def best(settings: Sequence[Setting]) -> Setting:
            if len(settings) == 1:
                return settings[0]
            _say(f"trials of {kind}: {' | '.join(map(str, settings))}")
            windows = self.race([(str(s), kind, s) for s in settings], num_rounds, seconds)
            speeds = {name: [self.images_per_s(times) for times in ones] for name, ones in windows.items()}
            winner = settings[fastest(list(speeds.values()))]
            trials.append({"images_per_s": speeds, "chosen": str(winner)})
            _say(f"best: {winner}")
            return winner

        all_ranks = sorted({1, num_cores()})
        if kind == OURS:
            return best([Setting(ranks) for ranks in all_ranks]), trials
        found = best([best([Setting(ranks, workers) for workers in (0, 1, 2)]) for ranks in all_ranks])
        layouts = [True, False] if kind == "torchvision" else [True]
        variants = [
            dataclasses.replace(found, channels_last=layout, fused=fused)
            for layout in layouts
            for fused in (True, False)
        ]
        return best(variants), trials

    def _program(self, label: str, kind: str, setting: Setting) -> Program:
        self._num_started += 1
        place = self._folder / str(self._num_started)
        place.mkdir()
        progress = place / "progress.jsonl"
        overrides = self._overrides(place, setting.ranks)
        threads = num_cores() // setting.ranks
        # A program that stands still answers neither Ray's pings nor its own timeouts.
        env = {**os.environ, "OMP_NUM_THREADS": str(threads), "MLFLOW_DISABLE_TELEMETRY": "true"}
        env |= {"PYTHONPATH": str(ROOT), "RAY_grpc_keepalive_timeout_ms": "86400000"}
        env |= {"RAY_grpc_client_keepalive_timeout_ms": "86400000"}
        env |= {"RAY_worker_niceness": "0"}  # 15 by default: others' work on the machine would hurt ours more
        if kind in (OURS, FIT):
            progress = place / "runs" / "race" / "samples" / "rank_0.jsonl"
            env = {k: v for k, v in env.items() if k not in ("OMP_NUM_THREADS", "MLFLOW_TRACKING_URI", "RAY_ADDRESS")}
        if kind == OURS:
            command = [str(Path(sys.executable).with_name("pipeline")), "train", str(CONFIG), *overrides]
            return Program(label, command, RAY_WORKER, env, progress, place / "log")
        case = self.case
        peer = Peer(
            kind=kind,
            data=str(self._photos),
            depth=case.depth,
            size=case.size,
            batch=case.batch,
            precision=case.precision,
            progress=str(progress),
            ranks=setting.ranks,
            threads=threads,
            workers=setting.workers or 0,
            channels_last=setting.channels_last,
            fused=setting.fused,
            config=str(CONFIG),
            overrides=overrides,
        )
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--monitor-interval", "5"]
        here = [f"--nproc-per-node={setting.ranks}", str(ROOT / "scripts" / RANK), json.dumps(asdict(peer))]
        return Program(label, [*torchrun, *here], RANK, env, progress, place / "log")

    def _overrides(self, place: Path, ranks: int) -> list[str]:
        case = self.case
        return [
            "run.name=race",
            f"run.storage={place / 'runs'}",
            f"data.train={self._photos}",
            f"data.val={self._photos}",
            f"data.image_size={case.size}",
            f"data.val_resize={case.size}",
            "data.log_samples=true",
            f"model.depth={case.depth}",
            f"optim.lr={LR}",
            "optim.lr_scaling=none",
            "train.steps=100000000",
            f"train.global_batch={case.batch}",
            f"train.precision={case.precision}",
            f"train.label_smoothing={LABEL_SMOOTHING}",
            "train.log_every=10",
            "train.eval_every=10000000",
            f"checkpoint.every={case.checkpoint_every}",
            "mlflow.checkpoints=none",
            f"cluster.workers={ranks}",
            "cluster.device=cpu",
            "cluster.timeout_s=86400",  # the others' turns are no failure
        ]


def main() -> int:
    args = _arguments()
    signal.signal(signal.SIGTERM, _interrupt)
    case = _case(args)
    with tempfile.TemporaryDirectory(prefix="peers-") as folder:
        photos = args.photos
        if photos is None:
            photos = Path(folder) / "photos"
            make_photos.write(photos, 512)
        bench = Bench(case, photos.absolute(), Path(folder), args.discard, args.warm_up)
        settings, trials = dict(BEST_GUESS), dict[str, Any]()
        for kind in settings if args.trials else ():
            settings[kind], trials[kind] = bench.choose(kind, args.trial_rounds, case.window / 2)
        settings |= {FIT: settings[OURS], CEILING: settings[OURS]}
        windows = bench.race([(kind, kind, s) for kind, s in settings.items()], args.rounds, case.window)
    steps = sum(map(len, windows[OURS]))
    result = {
        "case": asdict(case),
        "rounds": args.rounds,
        "num_ahead": args.discard,
        "checkpoints": steps // case.checkpoint_every,  # one more where the race began between two
        "settings": {name: str(s) for name, s in settings.items()},
        "trials": trials,
        **summarise(windows, case.batch, args.discard, bench.background[OURS]),
        "machine": describe_machine(),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
    }
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / f"peers_resnet{case.depth}_{case.size}.json").write_text(
            json.dumps(result, indent=2) + "\n", encoding="utf-8"
        )
    print(json.dumps(result) if args.json else "\n".join(table(result)))
    return int(any(result["ratios"][name]["median"] < aim for name, aim in AIMS.items()))


def _case(args: argparse.Namespace) -> Case:
    given = {
        "depth": args.model and int(args.model.removeprefix("resnet")),
        "size": args.size,
        "batch": args.batch,
        "window": args.window,
        "checkpoint_every": args.checkpoint_every,
        "precision": args.precision,
    }
    case = dataclasses.replace(CASES[args.case], **{key: value for key, value in given.items() if value is not None})
    here = [hardware_of(torch.device("cpu"))]
    case = dataclasses.replace(case, precision=decide(case.precision, here).precision)
    if warning := emulation(case.precision, here, "give --precision fp32"):
        _say(warning)
    return case


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, default="resnet152", help="what the next five are, if not given")
    parser.add_argument("--model", choices=[f"resnet{depth}" for depth in (18, 34, 50, 101, 152)])
    parser.add_argument("--size", type=int, help="pixels")
    parser.add_argument("--batch", type=int, help="images a step over all ranks; a multiple of the cores")
    parser.add_argument("--window", type=float, help="seconds of a turn, at the least; half of it in trials")
    parser.add_argument("--checkpoint-every", type=int, help="steps, ours")
    parser.add_argument("--precision", choices=["auto", "bf16", "fp32"], help="auto: bf16 where the CPU has it")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--discard", type=int, default=2, help="steps of a window that may have lain ready")
    parser.add_argument("--warm-up", type=float, default=15.0, help="seconds for each, after its first steps")
    parser.add_argument("--trials", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--trial-rounds", type=int, default=3)
    parser.add_argument("--photos", type=Path, help="a folder of class folders; else photographs are made")
    parser.add_argument("--out", type=Path, help="a folder for the result as JSON")
    parser.add_argument("--json", action="store_true", help="the result as one JSON object")
    return parser.parse_args()


def _interrupt(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt  # so that all that was started is ended


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
