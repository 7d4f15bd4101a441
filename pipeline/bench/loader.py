"""`pipeline bench loader`: our loader's images/s beside those that people use, on the same images and cores.

Absolute figures of a shared machine say little, so the loaders take turns, round by round, and what counts is the
ratio within a round.
"""

import importlib.metadata
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.bench import common
from pipeline.bench.common import batch_per_worker, describe_machine, spread, take_turns
from pipeline.bench.loader_baselines import (
    CEILING,
    OPTIONAL,
    OURS,
    LoaderBaseline,
    Task,
    loader_baselines,
    missing_packages,
)
from pipeline.bench.loader_process import LoaderProcess, Speed
from pipeline.config.data import DataConfig
from pipeline.config.schema import Config
from pipeline.data.indexing.build import Progress, open_index
from pipeline.errors import UserError
from pipeline.machine import cpu_count
from pipeline.text import between, columns, figure

TRIALS = 2  # rounds before those that count, to find each loader's best setting
AIM, AIM_SMALL = 1.6, 1.5  # times the best of the others, in batches of 64 and more, and in smaller ones
WHAT = "random-resized-crop and flip alone, whatever the configuration augments with; uint8 out, on the CPU"
PACKAGES = ("torch", "torchvision", "timm", "pillow", "nvidia-dali-cuda130")
Speeds = dict[str, list[Speed]]  # of each round, by loader


def bench_loader(
    cfg: Config, num_cores: int | None, num_rounds: int, num_images: int, progress: Progress
) -> dict[str, Any]:
    """Measure all loaders, by turns.

    Args:
        num_cores: that each loader may use; None for all that this process may.
        num_images: timed in a round, rounded up to whole batches.

    Raises:
        UserError: more cores than there are, missing packages or data.
    """
    left_out = missing_packages()
    installed = [package for name, (_, package) in OPTIONAL.items() if name not in left_out]
    usable = cpu_count()
    if num_cores and num_cores > usable:
        raise UserError(f"--cores {num_cores}: this process may use {usable}; lower it")
    cores = tuple(sorted(os.sched_getaffinity(0))[: num_cores or usable])
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "index.arrow"
        index, _ = open_index(cfg.data.train, progress=progress)
        index.save(file)
        batch = min(batch_per_worker(cfg), len(index))
        num_batches = -(-num_images // (batch * len(cores))) * len(cores)  # DataLoader's workers finish side by side
        task = Task(file, plain_config(cfg.data), batch, cores, num_batches, TRIALS + num_rounds)
        speeds, settings = measure(task, loader_baselines(len(cores)), progress)
    return {
        "train": cfg.data.train,
        "images": len(index),
        "median_size": [int(np.median(index.heights[:10_000])), int(np.median(index.widths[:10_000]))],
        "image_size": cfg.data.image_size,
        "batch": batch,
        "cores": len(cores),
        "rounds": num_rounds,
        "images_per_round": batch * num_batches,
        "what": WHAT,
        **summarise(speeds, settings),
        "machine": describe_machine(),
        "packages": {name: importlib.metadata.version(name) for name in [*PACKAGES, *installed]},
        "left_out": left_out,
    }


def plain_config(data: DataConfig) -> DataConfig:
    """The images' size and the range of crops and flips as configured, and else what every loader does: see WHAT."""
    images = ("image_size", "val_size", "val_resize", "crop_scale", "crop_ratio", "flip")
    loading = ("read_threads", "prefetch", "cache_dir", "cache_gb")
    return DataConfig(**{name: getattr(data, name) for name in (*images, *loading)})


def measure(task: Task, baselines: list[LoaderBaseline], progress: Progress) -> tuple[Speeds, dict[str, str]]:
    """Each loader's speed by rounds, and its setting: the one that did best in the trials."""
    processes = list[LoaderProcess]()
    try:
        for baseline in baselines:
            processes.append(LoaderProcess(baseline, task))
        trials = {process: max(process.run_round().per_s for _ in range(TRIALS)) for process in processes}
        fastest = {p.baseline.name: p for p in sorted(processes, key=lambda p: trials[p])}  # the last of a name wins
        racing = {p.baseline.name: p for p in processes if p in fastest.values()}
        rounds = {name: process.run_round for name, process in racing.items()}
        speeds = take_turns(rounds, task.num_rounds - TRIALS, progress, lambda speed: speed.per_s)
    finally:
        for process in processes:
            process.end()
    return speeds, {name: process.baseline.setting for name, process in racing.items()}


def summarise(speeds: Speeds, settings: dict[str, str]) -> dict[str, Any]:
    """Medians and quartiles; ours beside the best of the others within each round, and beside decoding alone."""
    per_s = {name: np.array([speed.per_s for speed in rounds]) for name, rounds in speeds.items()}
    per_cpu_s = {name: np.array([speed.per_cpu_s for speed in rounds]) for name, rounds in speeds.items()}
    others = [name for name in speeds if name not in (OURS, CEILING)]
    loaders = {
        name: {
            "setting": settings[name],
            **spread("images_per_s", per_s[name]),
            **spread("images_per_cpu_s", per_cpu_s[name]),
            "per_round": per_s[name].round(1).tolist(),
        }
        for name in speeds
    }
    return {
        "loaders": loaders,
        "best_other": max(others, key=lambda name: float(np.median(per_s[name]))),
        **spread("ratio", per_s[OURS] / np.max([per_s[name] for name in others], axis=0)),
        **spread("cpu_ratio", per_cpu_s[OURS] / np.max([per_cpu_s[name] for name in others], axis=0)),
        **spread("decode_share", per_cpu_s[OURS] / per_cpu_s[CEILING]),
    }


def format_result(result: dict[str, Any]) -> list[str]:
    """The result for people."""
    height, width = result["median_size"]
    rows = [("", "images/s", "quartiles", "per CPU s", "setting")]
    for name, loader in result["loaders"].items():
        quartiles = between(loader["images_per_s_quartiles"], ".0f")
        speeds = figure(loader["images_per_s"], ".0f"), quartiles, figure(loader["images_per_cpu_s"], ".0f")
        rows.append((name, *speeds, loader["setting"]))
    return [
        f"{result['images']} images of {result['train']}, {height}x{width} in the median, to {result['image_size']} "
        f"pixels; batch {result['batch']}, cores {result['cores']}",
        f"{result['rounds']} rounds of {result['images_per_round']} images; median and quartiles",
        result["what"],
        *columns(rows, "<><>"),
        *(f"left out: {name}; pip install {package}" for name, package in result["left_out"].items()),
        verdict(result),
    ]


def verdict(result: dict[str, Any]) -> str:
    """The ratio, and what holds our loader back."""
    times = AIM if result["batch"] >= 64 else AIM_SMALL
    aim = "the aim" if result["ratio"] >= times else "less than the aim"
    share = result["decode_share"]
    bound = "decoding" if share >= 0.5 else "what comes beside decoding: reading, draws, resizing"
    return (
        f"{OURS}: {result['ratio']:.2f} times the best other of each round (quartiles "
        f"{between(result['ratio_quartiles'], '.2f')}), {aim} of {times:g}; "
        f"by CPU time {result['cpu_ratio']:.2f} times; "
        f"{share:.0%} of its CPU time is decoding, so {bound} is what bounds it"
    )


def plot(result: dict[str, Any], file: Path) -> None:
    height, width = result["median_size"]
    title = f"{height}x{width} to {result['image_size']} pixels, batch {result['batch']}"
    colours = {OURS: "tab:green", CEILING: "lightgrey"}
    common.plot(result["loaders"], title, file, note=f", cores: {result['cores']}", colours=colours)
