"""The report's figures, as PNG files."""

from collections.abc import Mapping, Sequence
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.data.stream import FloatArray, IntArray
from pipeline.tracking.ledger import PHASES
from pipeline.tracking.metrics import ECE_BINS, Predictions

History = Mapping[str, Sequence[tuple[int, float]]]  # metric -> (step, value), by step

BLUE, ORANGE, GREY = "#2563eb", "#ea580c", "#94a3b8"
# Panel -> metric -> what it is called.
CURVES = {
    "loss": {"train/loss": "training", "val/loss": "validation"},
    "validation accuracy": {"val/top1": "top-1", "val/top5": "top-5"},
    "learning rate": {"train/lr": ""},
    "images/s": {"perf/images_per_s": ""},
}
METRICS = tuple(chain.from_iterable(CURVES.values()))
SMOOTH_FROM = 200  # points; a curve of more is drawn pale, with its moving average
MARKS_UP_TO = 30  # points, each of which is marked
MAX_CELLS = 250  # of a confusion matrix, a side; classes of larger ones share cells
MAX_NAMED = 25  # classes that are named at its sides
MAX_NAME = 20  # characters
# Of class names: what the first one lacks may be in another, where that is installed.
FONTS = ("DejaVu Sans", "Noto Sans CJK JP", "WenQuanYi Micro Hei", "WenQuanYi Zen Hei", "IPAGothic")


def curves(history: History, file: Path) -> None:
    """Loss, accuracy, learning rate and images/s by step."""
    from matplotlib.ticker import MaxNLocator

    figure = _figure(11, 6.2)
    for axes, (title, metrics) in zip(figure.subplots(2, 2).flat, CURVES.items(), strict=True):
        for (metric, name), colour in zip(metrics.items(), (BLUE, ORANGE), strict=False):
            if points := history.get(metric):
                steps, values = np.array(points, dtype=np.float64).T
                _curve(axes, steps, values, name, colour)
        axes.set_title(title, fontsize=10, loc="left", fontweight="bold")
        axes.grid(color="#e2e8f0", linewidth=0.8)
        axes.tick_params(labelsize=8)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.xaxis.set_major_formatter("{x:,.0f}")
        if axes.get_legend_handles_labels()[1]:
            axes.legend(frameon=False, fontsize=8)
    for axes in figure.axes[2:]:
        axes.set_xlabel("step", fontsize=9)
    figure.savefig(file)


def _curve(axes: Any, steps: FloatArray, values: FloatArray, name: str, colour: str) -> None:
    smooth = len(steps) > SMOOTH_FROM
    marker = "o" if len(steps) <= MARKS_UP_TO else ""
    label = "" if smooth else name
    axes.plot(steps, values, color=colour, alpha=0.25 if smooth else 1, marker=marker, markersize=3, label=label)
    if smooth:
        window = len(steps) // 50
        mean = np.convolve(values, np.full(window, 1 / window), "valid")
        axes.plot(steps[window // 2 :][: len(mean)], mean, color=colour, label=name)


def ledger(seconds: Mapping[str, float], file: Path) -> None:
    """The time in each phase; `seconds` as of `ledger.summed_up`."""
    figure = _figure(8, 0.4 * len(PHASES) + 0.8)
    axes = figure.subplots()
    values = [seconds[phase] for phase in PHASES]
    whole = sum(values) or 1.0
    bars = axes.barh(PHASES, values, color=[BLUE if phase == "compute" else GREY for phase in PHASES], height=0.7)
    axes.bar_label(bars, [f" {s:,.1f} s, {s / whole:.1%}" for s in values], fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.18)
    axes.set_xlabel("seconds, over all attempts", fontsize=9)
    axes.tick_params(labelsize=9)
    figure.savefig(file)


def reliability(predictions: Predictions, file: Path) -> None:
    """How often the model is right where it is so sure (Guo et al. 2017, figure 1), and on how many images."""
    confidence, accuracy, counts = predictions.reliability()
    figure = _figure(5, 5)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    edges, width, some = np.arange(ECE_BINS) / ECE_BINS, 1 / ECE_BINS, counts > 0
    upper.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1, label="perfectly calibrated")
    style: dict[str, Any] = {"align": "edge", "edgecolor": "white"}
    upper.bar(edges[some], accuracy[some], width, color=BLUE, label="share of right ones", **style)
    upper.plot(confidence[some], accuracy[some], "o", color=ORANGE, markersize=3, label="at their mean probability")
    upper.set(xlim=(0, 1), ylim=(0, 1.02))
    upper.set_ylabel("accuracy", fontsize=9)
    upper.legend(frameon=False, fontsize=8, loc="upper left")
    lower.bar(edges, counts, width, color=GREY, **style)
    lower.set_ylabel("images", fontsize=9)
    lower.set_xlabel("probability of the likeliest class", fontsize=9)
    for axes in (upper, lower):
        axes.tick_params(labelsize=8)
    figure.savefig(file)


def confusion(predictions: Predictions, classes: Sequence[str], file: Path) -> None:
    """Shares of each true class's images (a row) that were taken for each class (a column)."""
    cells = min(len(classes), MAX_CELLS)
    from matplotlib.colors import PowerNorm

    figure = _figure(7, 6)
    axes = figure.subplots()
    shares = _shares(predictions, len(classes), cells)
    extent = (-0.5, len(classes) - 0.5, len(classes) - 0.5, -0.5)
    image = axes.imshow(shares, "Blues", norm=PowerNorm(0.5, 0, 1), extent=extent, interpolation="nearest")
    bar = figure.colorbar(image, ax=axes, shrink=0.8, ticks=[0, 0.1, 0.25, 0.5, 1], format="{x:.0%}")
    bar.ax.tick_params(labelsize=8)
    each = "" if cells == len(classes) else f" (each cell: about {len(classes) / cells:.1f} classes)"
    axes.set_xlabel(f"taken for{each}", fontsize=9)
    axes.set_ylabel("true class", fontsize=9)
    axes.tick_params(labelsize=8)
    if len(classes) <= MAX_NAMED:
        names = [_drawable(name) for name in classes]
        axes.set_xticks(range(len(names)), names, rotation=90, parse_math=False, family=_fonts()[0])
        axes.set_yticks(range(len(names)), names, parse_math=False, family=_fonts()[0])
    figure.savefig(file)


def _shares(predictions: Predictions, num_classes: int, cells: int) -> FloatArray:
    """(cells, cells): rows of the confusion matrix by their sums; neighbouring classes together where it is larger."""
    of, to = predictions.labels * cells // num_classes, predictions.best[:, 0] * cells // num_classes
    counts: IntArray = np.bincount(of * cells + to, minlength=cells**2).reshape(cells, cells)
    shares: FloatArray = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    return shares


def _drawable(name: str) -> str:
    """A class's name as the figures' fonts have it."""
    short = name if len(name) <= MAX_NAME else f"{name[: MAX_NAME - 1]}…"
    return "".join(c if ord(c) in _fonts()[1] else "?" for c in short)


@cache
def _fonts() -> tuple[list[str], frozenset[int]]:
    """Those of FONTS that are installed, and their characters."""
    from matplotlib.font_manager import findfont, get_font_names
    from matplotlib.ft2font import FT2Font

    names = [name for name in FONTS if name in get_font_names()]
    return names, frozenset[int]().union(*(FT2Font(findfont(name)).get_charmap() for name in names)) - set(range(32))


def _figure(width: float, height: float) -> Any:
    """Not pyplot's, which keeps figures and picks a display."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=150, layout="constrained")
