"""What reliability costs a training: the time that it is held by a checkpoint, and by an MLflow in trouble.

    python scripts/bench_reliability.py checkpoint [--folder DIR] [--threads N] [--rounds N] [--json]
    python scripts/bench_reliability.py mlflow     [--rounds N] [--json]

checkpoint: ResNet-152 for 1,000 classes with momentum and EMA, saved by turns as the pipeline does (the loop waits
for a copy in memory) and by a plain torch.save + fsync to the same disk; and its checksums, by which workers compare.
mlflow: a small training that logs at every step, whose MLflow server is by turns up, away, failing and slow (10 s a
call): the median time of a step in each.
"""

import argparse
import dataclasses
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import make_digits
import torch

from pipeline.config.loading import load
from pipeline.events import Event, StepLogged
from pipeline.runs.async_checkpointer import AsyncCheckpointer
from pipeline.runs.spec import RunSpec, WorkerContext
from pipeline.storage import Storage
from pipeline.training.loop import fit
from pipeline.training.replicas import checksums
from pipeline.training.state import TrainState

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
META: dict[str, Any] = {"training_id": "bench", "fingerprint": "", "classes": [], "metrics": {}}
WINDOW = 12  # steps of one kind of trouble


def checkpoint(folder: Path, num_threads: int, rounds: int) -> dict[str, Any]:
    torch.set_num_threads(num_threads)
    cfg = load(None, ["data.train=none", "data.val=none", "train.ema_decay=0.9999", "checkpoint.keep=1"])
    state = TrainState.create(cfg, 1000, CPU)
    wrote: list[float] = []
    checkpointer = AsyncCheckpointer(
        Storage(folder), cfg, check=lambda: None, written=lambda _, seconds: wrote.append(seconds), warn=print
    )
    held, plain, compared = list[float](), list[float](), list[float]()
    for state.step in range(rounds + 1):
        began = time.perf_counter()
        checkpointer.save(state.step, state.finite_state_dict, lambda: META, now=True)
        held.append(time.perf_counter() - began)
        while checkpointer.busy:
            time.sleep(0.01)
        began = time.perf_counter()
        with (folder / "plain.pt").open("wb") as f:
            torch.save(state.state_dict(), f)
            f.flush()
            os.fsync(f.fileno())
        plain.append(time.perf_counter() - began)
        began = time.perf_counter()
        checksums(state, CPU)
        compared.append(time.perf_counter() - began)
    checkpointer.finish(60)
    ratios = [a / b for a, b in zip(held[1:], plain[1:], strict=True)]
    return {
        "bytes": (folder / "plain.pt").stat().st_size,
        "blocking_s": statistics.median(held[1:]),
        "held_first_s": held[0],  # it also makes the buffers
        "torch_save_fsync_s": statistics.median(plain[1:]),
        "replicas_compared_s": statistics.median(compared[1:]),
        "written_beside_s": statistics.median(wrote[1:]),
        "ratio": statistics.median(ratios),
        "ratio_quartiles": statistics.quantiles(ratios, n=4)[::2],
        "rounds": rounds,
    }


def mlflow(folder: Path, rounds: int) -> dict[str, Any]:
    sys.path.insert(0, str(ROOT / "tests" / "support"))
    from s3 import free_port
    from servers import MlflowServer, Mode, Proxy

    make_digits.write(folder / "digits")
    port, kinds = free_port(), list[Mode](["up", "down", "500", "slow"])
    with MlflowServer(folder, port) as server, Proxy(port, free_port()) as proxy:
        server.start()
        steps: dict[str, list[float]] = {kind: [] for kind in kinds}
        last = 0.0

        def watch(event: Event) -> None:
            nonlocal last
            if not isinstance(event, StepLogged):
                return
            now, step = time.perf_counter(), event.step
            if step > WINDOW and step % WINDOW > 1:  # not the first of a window
                steps[proxy.mode].append(now - last)
            last, proxy.mode = now, kinds[step // WINDOW % len(kinds)]

        index, num_steps = _index(folder / "digits"), (rounds * len(kinds) + 1) * WINDOW
        length = [f"train.steps={num_steps}", "train.log_every=1", "train.eval_every=1000", "checkpoint.every=100000"]
        quiet = ["mlflow.checkpoints=none", "mlflow.log_model=false", "mlflow.warn=false"]
        quiet += [f"mlflow.uri={proxy.uri}", "model.depth=18"]
        cfg = load(ROOT / "configs/digits.yaml", [f"data.train={index}", f"data.val={index}", *length, *quiet])
        (folder / "run").mkdir()
        torch.set_num_threads(1)
        context = WorkerContext(0, 1, CPU, 1, watch)
        fit(RunSpec(dataclasses.replace(cfg), Storage(folder / "run"), str(index), str(index)), context)
    medians = {kind: statistics.median(times) for kind, times in steps.items()}
    return {
        "step_ms": {kind: 1000 * s for kind, s in medians.items()},
        "ratio_to_up": {kind: s / medians["up"] for kind, s in medians.items()},
        "quartiles_ms": {kind: [1000 * q for q in statistics.quantiles(t, n=4)[::2]] for kind, t in steps.items()},
        "steps_of_each": len(steps["up"]),
    }


def _index(digits: Path) -> Path:
    from pipeline.data.indexing.build import build_index

    build_index(digits / "train")[0].save(digits / "train.arrow")
    return digits / "train.arrow"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["checkpoint", "mlflow"])
    parser.add_argument("--folder", type=Path, help="on the disk to be measured; the system's temporary one by default")
    parser.add_argument("--threads", type=int, default=1, help="of torch, as a worker on one core has")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", action="store_true", help="figures as one JSON object")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        result = (
            checkpoint(folder, args.threads, args.rounds) if args.what == "checkpoint" else mlflow(folder, args.rounds)
        )
    if args.json:
        print(json.dumps(result))
        return
    for key, value in result.items():
        print(f"{key:20} {_figures(value)}")


def _figures(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_figures(v)}" for k, v in value.items())
    if isinstance(value, list):
        return " to ".join(map(_figures, value))
    return f"{value:.3f}" if isinstance(value, float) else f"{value:,}"


if __name__ == "__main__":
    main()
