"""What people see of a plan: cluster sizes, what to change, and every number that it rests on; 80 columns wide."""

import textwrap
from typing import Any

from pipeline.text import between, columns, figure

WIDTH = 80


def format_plan(result: dict[str, Any]) -> list[str]:
    """The lines of `plan.plan()`'s answer."""
    lines = _wrap(_title(result))
    for note in result["notes"]:
        lines += _wrap(note)
    head = ("", "GPUs", "batch", "images/s", "effic.", "goodput", "hours", "$", "bound by")
    rows = [_row(row, row["gpus"] == result["gpus"]) for row in result["rows"]]
    lines += ["", *columns([head, *rows], "<>>>>>>><"), ""]
    lines += [*_step(result), *_checkpoints(result["checkpoints"])]
    if result["measured"]:
        lines += ["", *_measured(result["measured"])]
    lines += ["", "All numbers that this rests on (--assume NAME=VALUE replaces one):"]
    assumptions = result["assumptions"]
    rows = [(name, f"{a['value']:,.10g} {a['unit']}", a["origin"], a["what"]) for name, a in assumptions.items()]
    for line, (*_, text) in zip(columns(rows), rows, strict=True):
        lines += _wrap(line, " " * (len(line) - len(text)))
    return lines


def _wrap(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(text, WIDTH, subsequent_indent=indent, break_on_hyphens=False)


def _title(result: dict[str, Any]) -> str:
    net, alone = result["network"], result["images_per_s_per_gpu"]
    length = f"{result['steps']:,} steps" if result["steps"] else f"{result['epochs']} epochs"
    batch = "the recipe's global batch" if result["scaling"] == "strong" else "a fixed batch on each GPU"
    return (
        f"ResNet-{net['depth']}, {net['image_size']} pixels, {result['precision']}, {length} of {result['images']:,} "
        f"images, {result['gpu']}, {batch}. {net['parameters'] / 1e6:.1f} million parameters, "
        f"{net['macs'] / 1e9:.2f} billion multiply-adds an image; one GPU alone at a large batch: "
        f"{alone['value']:,.0f} images/s ({alone['origin']})."
    )


def _row(row: dict[str, Any], chosen: bool) -> tuple[str, ...]:
    sizes = figure(row["gpus"]), figure(row["global_batch"]), figure(row["images_per_s"], ",.0f")
    shares = figure(row["efficiency"], ".2f"), figure(row["goodput"])
    costs = _hours(row["hours"]), figure(row["cost"], ",.0f")
    return ">" if chosen else "", *sizes, *shares, *costs, row["bound"]


def _hours(hours: float | None) -> str:
    return figure(hours, ",.2f" if hours is not None and hours < 10 else ",.1f")


def _step(result: dict[str, Any]) -> list[str]:
    chosen = next(row for row in result["rows"] if row["gpus"] == result["gpus"])
    parts = ", ".join(f"{name} {seconds * 1e3:.1f}" for name, seconds in chosen["parts"].items())
    size = "one GPU" if chosen["gpus"] == 1 else f"{chosen['gpus']:,} GPUs"
    lines = _wrap(
        f"On {size} a step takes {chosen['step_s'] * 1e3:.1f} ms: {parts}. Beside it, and hidden if "
        f"shorter: reading {chosen['read_s'] * 1e3:.1f}, decoding {chosen['decode_s'] * 1e3:.1f}."
    )
    lines += _between_nodes(result)
    best = result["changes"][0] if result["changes"] else None
    if best and best["saves"] >= 0.05:
        lines += _wrap(f"Helps most: {best['change']}; {_hours(best['hours'])} hours, {best['saves']:.0%} fewer.")
    elif best:
        lines += _wrap("No single change would save 5% of the hours; more or faster GPUs would.")
    speeds = {row["gpus"]: row["images_per_s"] for row in result["rows"]}
    poor = [gpus for gpus in speeds if 2 * gpus in speeds and speeds[2 * gpus] < 1.5 * speeds[gpus]]
    if poor:
        lines += _wrap(f"From {poor[0]:,} GPUs on, twice as many bring less than 1.5 times the speed.")
    return lines


def _between_nodes(result: dict[str, Any]) -> list[str]:
    """What RDMA is worth: a run without it looks like any other that is slow."""
    if not (transports := result["between_nodes"]):
        return []
    wait, step = (
        {name: f"{times[key] * 1e3:.1f} ms" for name, times in transports.items()} for key in ("network_s", "step_s")
    )
    if result["assumptions"]["rdma"]["value"]:
        return _wrap(
            f"By RDMA between nodes, steps wait {wait['rdma']} for the network. Without it NCCL takes TCP and says "
            f"nothing: they would wait {wait['tcp']}, and take {step['tcp']} (estimated; --assume rdma=0)."
        )
    return _wrap(
        f"Over TCP between nodes, steps wait {wait['tcp']} for the network. By RDMA they would wait {wait['rdma']}, "
        f"and take {step['rdma']} (estimated)."
    )


def _checkpoints(checkpoints: dict[str, Any]) -> list[str]:
    num_failures = checkpoints["failures"]
    times = "" if num_failures is None else f", {num_failures:.2g} in the whole run"
    lines = _wrap(
        f"A failure every {checkpoints['mtbf'] / 3600:,.2f} h{times}. A checkpoint holds steps for "
        f"{checkpoints['hold']:.2f} s and is written in {checkpoints['write']:.1f} s, so least is lost with "
        f"{checkpoints['daly_s']:,.0f} s between two (Daly; Young: {checkpoints['young_s']:,.0f} s):"
    )
    best, configured = checkpoints["best"], checkpoints["configured"]
    for name, interval in (("best", best), ("configured", configured)):
        spread, text = interval["simulated"], "not simulated, for its many failures"
        if spread:
            text = (
                f"simulated {1 - spread['mean']:.3%}, standard error {spread['error']:.3%}, nine runs in ten "
                f"{between((1 - spread['high'], 1 - spread['low']), '.3%')}"
            )
        lines += _wrap(
            f"  {name:<11}checkpoint.every={interval['every']} ({interval['interval_s']:,.0f} s) loses "
            f"{1 - interval['goodput']:.3%} of the time; {text}",
            " " * 13,
        )
    if not best["goodput"]:
        return lines
    more = best["goodput"] - configured["goodput"]
    fix = "leave it" if more < 0.001 else f"set checkpoint.every={best['every']}"
    return [*lines, *_wrap(f"The configured interval loses {more:.3%} more than the best: {fix}.")]


def _measured(measured: dict[str, Any]) -> list[str]:
    lines = _wrap(
        f"Measured here, and predicted from one worker, a link of {measured['network_gb_s']:.3g} GB/s, a jitter of "
        f"{measured['jitter']:.3f} and an overlap of {measured['overlap']:g}:"
    )
    for workers, row in measured["workers"].items():
        slower = row["compute_ratio"]
        text = "" if slower is None else f"; a step computed for {slower:.2f} times as long as one worker's"
        efficiency = f"efficiency {row['predicted']:.3f} predicted, {row['measured']:.3f} measured"
        lines += _wrap(f"  {workers} workers: {efficiency}{text}", "    ")
    return lines
