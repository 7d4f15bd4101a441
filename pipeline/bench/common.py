"""What all benchmarks share: what is trained, turns, medians and quartiles, the machine, and plots."""

import platform
import resource
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from pipeline.config.running import ClusterConfig
from pipeline.config.schema import Config
from pipeline.data.indexing.build import Progress
from pipeline.data.stream import FloatArray
from pipeline.machine import cpu_count
from pipeline.versions import cpu_model

T = TypeVar("T")
NEVER = 10**9  # a step that no training comes to


def config_to_measure(
    cfg: Config, cluster: ClusterConfig, name: str, storage: str, uri: str | None, *, batch: int, steps: int, every: int
) -> Config:
    """A training of so many steps, logged `every` so many, with nothing beside it that a benchmark would count."""
    return replace(
        cfg,
        run=replace(cfg.run, name=name, storage=storage, stop_at_step=steps),
        model=replace(cfg.model, weights=None),  # a run's name would be looked up in this storage
        train=replace(cfg.train, global_batch=batch, steps=NEVER, log_every=every, eval_every=NEVER, profile=None),
        checkpoint=replace(cfg.checkpoint, every=NEVER),
        mlflow=replace(cfg.mlflow, uri=uri, log_model=False, register=None, checkpoints="none"),
        cluster=cluster,
    )


def batch_per_worker(cfg: Config) -> int:
    """The largest share of a global batch, in images."""
    return -(-cfg.train.global_batch // cfg.cluster.max_workers)


def take_turns(
    measurements: Mapping[str, Callable[[], T]],
    num_rounds: int,
    progress: Progress,
    per_s: Callable[[T], float],
    unit: str = "",
) -> dict[str, list[T]]:
    """Measure round by round, in an order in which nobody always follows the same one.

    Args:
        per_s: images/s of a measurement, to be shown.
        unit: of the names, such as " workers".

    Returns:
        What was measured by name, in the rounds' order.
    """
    names = list(measurements)
    measured: dict[str, list[T]] = {name: [] for name in names}
    for i in range(num_rounds):
        first = i % len(names)
        for name in [*names[first:], *names[:first]]:
            measured[name].append(measurements[name]())
        speeds = ", ".join(f"{name}{unit} {per_s(values[-1]):.1f}" for name, values in measured.items())
        progress(i + 1, num_rounds, f"images/s: {speeds}")
    return measured


def spread(name: str, values: FloatArray) -> dict[str, Any]:
    """The median as `name`, and both quartiles."""
    low, median, high = np.percentile(values, [25, 50, 75]).round(4).tolist()
    return {name: median, f"{name}_quartiles": [low, high]}


def compare(per_s: Mapping[str, list[float]], to: str) -> dict[str, dict[str, Any]]:
    """Of images/s by rounds: medians and quartiles, and those of the ratio to `to` within each round."""
    return {
        name: {
            **spread("images_per_s", np.array(rates)),
            **spread("ratio", np.array(rates) / np.array(per_s[to])),
            "per_round": [round(rate, 2) for rate in rates],
        }
        for name, rates in per_s.items()
    }


def describe_machine() -> dict[str, Any]:
    return {"cpu": cpu_model(), "cores": cpu_count(), "python": platform.python_version()}


def peak_memory(device: torch.device) -> float:
    """Bytes: of the GPU, or of this process."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def describe(cfg: Config) -> dict[str, Any]:
    """What is trained, and on what."""
    training = {"depth": cfg.model.depth, "image_size": cfg.data.image_size, "precision": cfg.train.precision}
    return training | {"machine": describe_machine(), "torch": torch.__version__}


def title(result: dict[str, Any]) -> str:
    """Of a result that has what `describe` says."""
    return f"ResNet-{result['depth']}, {result['image_size']} pixels, {result['precision']}"


def plot(
    bars: Mapping[str, dict[str, Any]], title: str, file: Path, *, note: str = "", colours: Mapping[str, str] = {}
) -> None:
    """Bars of the medians of images/s, with the quartiles and each round's figure.

    Args:
        bars: {"images_per_s", "images_per_s_quartiles", "per_round"} of each.
        note: what else there is to say at the axis.
        colours: of bars that are not blue.
    """
    from matplotlib.figure import Figure  # not pyplot, which keeps figures and picks a display

    figure = Figure(figsize=(8, 1.2 + 0.5 * len(bars)), layout="constrained")
    axes = figure.subplots()
    for y, (name, bar) in enumerate(reversed([*bars.items()])):
        median, (low, high) = bar["images_per_s"], bar["images_per_s_quartiles"]
        colour = colours.get(name, "tab:blue")
        axes.barh(y, median, xerr=[[median - low], [high - median]], color=colour, capsize=4, height=0.6)
        axes.plot(bar["per_round"], [y] * len(bar["per_round"]), "k.", markersize=3, alpha=0.5)
        axes.annotate(f"{median:.4g} ", (0, y), xytext=(6, 0), textcoords="offset points", va="center")
    axes.set_yticks(range(len(bars)), list(bars)[::-1])
    axes.set_xlabel(f"images/s{note}; bars: median, lines: quartiles, dots: rounds")
    axes.set_title(title)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=150)
