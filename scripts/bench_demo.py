"""What the pipeline costs: the demo's training beside the bare network on synthetic tensors.

    python scripts/bench_demo.py [--windows 20] [--threads 2] [--json] [key=value ...]

One process trains configs/digits.yaml through `fit` (index, DALI, mixed precision, MLflow on SQLite),
and between two logged steps runs as many steps of a plain torch loop over one batch that is already
decoded, so that both meet the same machine within seconds. Same network, batch, precision, optimizer
and threads. Evaluation and checkpoints are left out, and so is Ray, whose part in a step is one
message at a logged step. Each window gives a ratio; their median and quartiles are what counts.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch.nn import functional as F

from pipeline import runs
from pipeline.config import Config
from pipeline.job import Context, Event
from pipeline.model import ResNet
from pipeline.optim import make_optimizer
from pipeline.settings import load
from pipeline.step import autocast
from pipeline.train import fit

CONFIG = Path(__file__).parent.parent / "configs" / "digits.yaml"
NUM_CLASSES = 10
WINDOW = 4  # steps
CPU = torch.device("cpu")


class Bare:
    """Forward, backward and update of the demo's network on one random batch."""

    def __init__(self, cfg: Config):
        self._cfg = cfg
        self._model = ResNet(cfg.model, NUM_CLASSES).to(memory_format=torch.channels_last)
        self._optimizer = make_optimizer(self._model, cfg.optim)
        size, batch = cfg.data.image_size, cfg.train.global_batch
        images = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8)
        self._images = images.contiguous(memory_format=torch.channels_last)
        self._labels = torch.randint(0, NUM_CLASSES, (batch,))

    def seconds(self, num_steps: int) -> float:
        started = time.perf_counter()
        for _ in range(num_steps):
            self._optimizer.zero_grad(set_to_none=True)
            with autocast(self._cfg.train.precision, CPU):
                logits = self._model(self._images)
            loss = F.cross_entropy(logits.float(), self._labels, label_smoothing=self._cfg.train.label_smoothing)
            loss.backward()  # type: ignore[no-untyped-call]
            self._optimizer.step()
        return time.perf_counter() - started


def measure(cfg: Config, num_threads: int) -> list[tuple[float, float]]:
    """(pipeline, bare) seconds of each window; the first one, in which both warm up, is left out."""
    bare, windows = Bare(cfg), list[tuple[float, float]]()
    since = 0.0

    def watch(event: Event) -> None:
        nonlocal since
        if event["kind"] == "step":
            pipeline = time.perf_counter() - since
            windows.append((pipeline, bare.seconds(WINDOW)))
            since = time.perf_counter()

    with runs.prepare(cfg, watch) as job:
        fit(job, Context(0, 1, CPU, num_threads, watch))
    return windows[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=20, help=f"of {WINDOW} steps")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="figures as one JSON object")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    steps = (args.windows + 1) * WINDOW
    with tempfile.TemporaryDirectory() as storage:
        fixed = [
            f"train.steps={steps}",
            f"train.log_every={WINDOW}",
            "checkpoint.every=1000000",
            "train.eval_every=1000",
        ]
        place = [
            f"run.storage={storage}",
            "run.name=bench",
            "cluster.workers=1",
            "mlflow.log_model=false",
            "mlflow.checkpoints=none",
        ]
        windows = measure(load(CONFIG, [*fixed, *place, *args.overrides]), args.threads)
    images = WINDOW * load(CONFIG, args.overrides).train.global_batch
    quartiles = statistics.quantiles([bare / pipeline for pipeline, bare in windows], n=4)
    result = {
        "pipeline_images_per_s": statistics.median(images / pipeline for pipeline, _ in windows),
        "bare_images_per_s": statistics.median(images / bare for _, bare in windows),
        "ratio": quartiles[1],
        "ratio_quartiles": [quartiles[0], quartiles[2]],
        "windows": len(windows),
    }
    if args.json:
        print(json.dumps(result))
    else:
        print(
            f"{len(windows)} windows of {WINDOW} steps: pipeline {result['pipeline_images_per_s']:.1f} images/s, "
            f"bare {result['bare_images_per_s']:.1f} images/s, "
            f"ratio {quartiles[1]:.3f} (quartiles {quartiles[0]:.3f} to {quartiles[2]:.3f})"
        )


if __name__ == "__main__":
    main()
