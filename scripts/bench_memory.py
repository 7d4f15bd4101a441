"""Whether the loader's memory stays flat over many batches of images of widely varying sizes.

    python scripts/bench_memory.py [--batches 10000] [--threads 2] [--json]

JPEGs and PNGs with sides of 64 to 1,200 pixels go through the training loader on the CPU in batches of 4, once with
crops and flips alone and once with every augmentation and a growing image size, each in a fresh process. Ends with 1
where the median resident memory over the last tenth of the batches is more than 5% above that of the 500 batches after
the first 500.
"""

import argparse
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from pipeline.config.data import DataConfig
from pipeline.data.index import load_index
from pipeline.data.indexing.build import build_index
from pipeline.data.loading.loader import LoaderContext, TrainLoader

NUM_IMAGES, NUM_CLASSES, SIDES = 256, 4, (64, 1200)  # pixels
GLOBAL_BATCH, SAMPLE_EVERY, SETTLED = 4, 100, 500  # images; batches
MAX_GROWTH = 0.05
SIZE = {"image_size": 64, "val_resize": 64}
KINDS: dict[str, dict[str, Any]] = {
    "crop and flip": SIZE,
    "all augmentations": {
        **SIZE,
        "start_size": 32,
        "grow_epochs": (0.0, 20.0),
        "repeated_aug": 2,
        "jitter": (0.4, 0.4, 0.4, 0.1),
        "auto_augment": "trivial",
        "erase": 0.25,
        "mixup": 0.2,
        "cutmix": 1.0,
    },
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=10_000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="figures as one JSON object")
    args = parser.parse_args()
    if args.batches < 2 * SETTLED:
        parser.error(f"--batches {args.batches}: must be at least {2 * SETTLED}")
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        file = write_images(Path(folder))
        for kind in KINDS:
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
                results[kind] = fresh.submit(measure, file, kind, args.batches, args.threads).result()
    if args.json:
        print(json.dumps(results))
    else:
        for kind, one in results.items():
            print(
                f"{kind}: {one['early_mb']:.0f} MB just after batch {SETTLED}, {one['late_mb']:.0f} MB over the last "
                f"tenth of {args.batches} ({one['growth']:+.1%}), {one['peak_mb']:.0f} MB at most; "
                f"{one['images_per_s']:.0f} images/s"
            )
    return int(any(one["growth"] > MAX_GROWTH for one in results.values()))


def write_images(folder: Path) -> Path:
    """Photographs of many sizes and shapes, an eighth of them PNGs; returns their index file."""
    photos = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    draws = np.random.default_rng(0)
    for i in range(NUM_IMAGES):
        width, height = np.exp(draws.uniform(np.log(SIDES[0]), np.log(SIDES[1]), 2)).astype(int).tolist()
        file = folder / "images" / str(i % NUM_CLASSES) / f"{i:03d}.{'png' if i % 8 == 0 else 'jpg'}"
        file.parent.mkdir(parents=True, exist_ok=True)
        photos[i % len(photos)].resize((width, height)).save(file)
    index, _ = build_index(folder / "images")
    index.save(folder / "index.arrow")
    return folder / "index.arrow"


def measure(file: Path, kind: str, num_batches: int, num_threads: int) -> dict[str, Any]:
    """Resident memory, of the processes that read, too, sampled over the batches, and its growth."""
    torch.set_num_threads(num_threads)
    cfg = DataConfig(train=str(file), val=str(file), **KINDS[kind])
    context = LoaderContext(0, 1, torch.device("cpu"), num_threads)
    loader = TrainLoader(load_index(file), cfg, context, _refuse, global_batch=GLOBAL_BATCH, seed=0)
    me, samples, started = psutil.Process(), dict[int, float](), time.perf_counter()
    for i, _ in enumerate(loader.from_step(0, num_batches), start=1):
        if i % SAMPLE_EVERY == 0:
            samples[i] = sum(p.memory_info().rss for p in (me, *me.children())) / 1e6
    early = statistics.median(mb for i, mb in samples.items() if SETTLED <= i < 2 * SETTLED)
    late = statistics.median(mb for i, mb in samples.items() if i > 0.9 * num_batches)
    return {
        "early_mb": early,
        "late_mb": late,
        "growth": late / early - 1,
        "peak_mb": max(samples.values()),
        "images_per_s": num_batches * GLOBAL_BATCH / (time.perf_counter() - started),
        "samples_mb": [round(mb, 1) for mb in samples.values()],
    }


def _refuse(path: str, reason: str) -> None:
    raise RuntimeError(f"{path}: {reason}")


if __name__ == "__main__":
    sys.exit(main())
