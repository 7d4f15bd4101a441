"""What the whole pipeline costs: the demo's training beside the bare network on synthetic tensors.

    python scripts/bench_demo.py [--rounds 3] [--threads 2] [key=value ...]

Each round trains twice, one after the other: a plain torch loop over one random batch that is
already decoded, and `pipeline train` of configs/digits.yaml on one Ray worker, with DALI, MLflow and
checkpoints on. Same network, batch, precision, optimizer and threads. Evaluation, checkpoints and the
first window of steps (warm-up) are left out of both; the ratio's median and range are what counts.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from pipeline import launch, runs
from pipeline.config import Config
from pipeline.job import Event
from pipeline.model import ResNet
from pipeline.optim import make_optimizer
from pipeline.settings import load
from pipeline.step import autocast

CONFIG = Path(__file__).parent.parent / "configs" / "digits.yaml"
NUM_CLASSES = 10


def bare(cfg: Config, num_steps: int, warm_up: int) -> float:
    """Images per second of forward, backward and update alone."""
    torch.manual_seed(0)
    cpu = torch.device("cpu")
    model = ResNet(cfg.model, NUM_CLASSES).to(memory_format=torch.channels_last)
    optimizer = make_optimizer(model, cfg.optim)
    size = cfg.data.image_size
    images = torch.randint(0, 256, (cfg.train.global_batch, 3, size, size), dtype=torch.uint8)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, NUM_CLASSES, (cfg.train.global_batch,))
    started = 0.0
    for step in range(num_steps):
        if step == warm_up:
            started = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        with autocast(cfg.train.precision, cpu):
            logits = model(images)
        F.cross_entropy(logits.float(), labels, label_smoothing=cfg.train.label_smoothing).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return (num_steps - warm_up) * cfg.train.global_batch / (time.perf_counter() - started)


def whole(cfg: Config) -> float:
    """Images per second of the pipeline's steps, by its own events, without the first window."""
    rates: list[float] = []

    def watch(event: Event) -> None:
        if event["kind"] == "step":
            rates.append(event["perf/images_per_s"])

    with runs.prepare(cfg, "bench", watch) as job:
        launch.train(job, watch)
    return statistics.harmonic_mean(rates[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="figures as one JSON object")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rounds: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as storage:
        fixed = ["cluster.workers=1", f"cluster.cpus_per_worker={args.threads}", f"run.storage={storage}"]
        cfg = load(CONFIG, ["train.steps=40", "mlflow.log_model=false", *fixed, *args.overrides])
        assert cfg.train.steps is not None
        for _ in range(args.rounds):
            one = {"bare": bare(cfg, cfg.train.steps, cfg.train.log_every), "whole": whole(cfg)}
            rounds.append({**one, "ratio": one["whole"] / one["bare"]})
            if not args.json:
                print("  ".join(f"{name} {value:.3g}" for name, value in rounds[-1].items()), flush=True)
    result = {name: statistics.median(r[name] for r in rounds) for name in ("bare", "whole", "ratio")}
    spread = [min(r["ratio"] for r in rounds), max(r["ratio"] for r in rounds)]
    if args.json:
        print(json.dumps({**result, "ratio_range": spread, "rounds": rounds}))
    else:
        print(
            f"median: bare {result['bare']:.1f} images/s, whole {result['whole']:.1f} images/s, "
            f"ratio {result['ratio']:.3f} ({spread[0]:.3f} to {spread[1]:.3f})"
        )


if __name__ == "__main__":
    main()
