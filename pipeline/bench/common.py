"""What all benchmarks share: what is trained, turns, medians and quartiles, the machine, and where results go."""

import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from pipeline.config.schema import ClusterConfig, Config
from pipeline.data.stream import FloatArray
from pipeline.machine import cpu_count
from pipeline.versions import cpu_model

T = TypeVar("T")
NEVER = 10**9  # a step that no training comes to


def to_measure(
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


def turns(ones: Sequence[T], num_rounds: int) -> Iterator[list[T]]:
    """The order of each round, in which nobody always follows the same one."""
    for i in range(num_rounds):
        first = i % len(ones)
        yield [*ones[first:], *ones[:first]]


def spread(name: str, values: FloatArray) -> dict[str, Any]:
    """The median as `name`, and both quartiles."""
    low, median, high = np.percentile(values, [25, 50, 75]).round(4).tolist()
    return {name: median, f"{name}_quartiles": [low, high]}


def rows(per_s: Mapping[str, list[float]], to: str) -> dict[str, dict[str, Any]]:
    """Of images/s by rounds: medians and quartiles, and those of the ratio to `to` within each round."""
    return {
        name: {
            **spread("images_per_s", np.array(ones)),
            **spread("ratio", np.array(ones) / np.array(per_s[to])),
            "per_round": [round(one, 2) for one in ones],
        }
        for name, ones in per_s.items()
    }


def machine() -> dict[str, Any]:
    return {"cpu": cpu_model(), "cores": cpu_count(), "python": platform.python_version()}


def about(cfg: Config) -> dict[str, Any]:
    """What is trained, and on what."""
    what = {"depth": cfg.model.depth, "image_size": cfg.data.image_size, "precision": cfg.train.precision}
    return what | {"machine": machine(), "torch": torch.__version__}


def title(result: dict[str, Any]) -> str:
    """Of a result that has what `about` says."""
    return f"ResNet-{result['depth']}, {result['image_size']} pixels, {result['precision']}"


def plot(
    bars: Mapping[str, dict[str, Any]], title: str, file: Path, *, text: str = "", colours: Mapping[str, str] = {}
) -> None:
    """Bars of the medians of images/s, with the quartiles and each round's figure.

    Args:
        bars: {"images_per_s", "images_per_s_quartiles", "per_round"} of each.
        text: what else there is to say at the axis.
        colours: of bars that are not blue.
    """
    from matplotlib.figure import Figure  # not pyplot, which keeps figures and picks a display

    names = list(bars)[::-1]
    figure = Figure(figsize=(8, 1.2 + 0.5 * len(names)), layout="constrained")
    axes = figure.subplots()
    for y, name in enumerate(names):
        one = bars[name]
        middle, (low, high) = one["images_per_s"], one["images_per_s_quartiles"]
        colour = colours.get(name, "tab:blue")
        axes.barh(y, middle, xerr=[[middle - low], [high - middle]], color=colour, capsize=4, height=0.6)
        axes.plot(one["per_round"], [y] * len(one["per_round"]), "k.", markersize=3, alpha=0.5)
        axes.annotate(f"{middle:.4g} ", (0, y), xytext=(6, 0), textcoords="offset points", va="center")
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel(f"images/s{text}; bars: median, lines: quartiles, dots: rounds")
    axes.set_title(title)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=150)
