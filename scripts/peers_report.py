"""The arithmetic and the words of bench_peers.py: speeds within windows, ratios within rounds, verdicts."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

PEERS, OURS, FIT, CEILING = ("torchvision", "timm"), "pipeline", "fit", "ceiling"
AIMS = {"best peer": 1.0, CEILING: 0.97}
Windows = Mapping[str, Sequence[Sequence[float]]]  # by contestant and round: when each step was done, seconds


def steps_per_s(times: Sequence[float], num_ahead: int) -> float:
    """The speed within a window.

    The step that was cut by freezing is left out, and so are `num_ahead` more, for which batches may have lain ready.

    Args:
        times: when each step of the window was done.
    """
    counted = times[num_ahead:]
    assert len(counted) >= 2, "the window was to be long enough"
    return (len(counted) - 1) / (counted[-1] - counted[0])


def pooled(windows: Sequence[Sequence[float]], num_ahead: int) -> float:
    """The speed over all windows together, in steps per second; it has in it what is rarer than one a window."""
    counted = [times[num_ahead:] for times in windows]
    return sum(len(times) - 1 for times in counted) / sum(times[-1] - times[0] for times in counted)


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The lower quartile, the median, the upper quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def fastest(speeds: Sequence[Sequence[float]]) -> int:
    """Which of them is the fastest, by the median of its share in each round's sum."""
    sums = [sum(ones) for ones in zip(*speeds, strict=True)]
    shares = [statistics.median(s / total for s, total in zip(ones, sums, strict=True)) for ones in speeds]
    return shares.index(max(shares))


def summarise(windows: Windows, batch: int, num_ahead: int, background: float) -> dict[str, Any]:
    """Speeds, ratios within rounds and over all of them, and what Ray and MLflow cost a step.

    Args:
        background: the share of the machine that our processes take in the others' windows. Without it these would have
            been faster by 1 / (1 - background) at the most, and are taken to have been.
    """
    per_s = {name: [steps_per_s(times, num_ahead) for times in ones] for name, ones in windows.items()}
    total = {name: pooled(ones, num_ahead) for name, ones in windows.items()}
    for name in windows:
        if name != OURS:
            per_s[name] = [s / (1 - background) for s in per_s[name]]
            total[name] /= 1 - background
    others = {
        "best peer": (
            [max(pair) for pair in zip(*(per_s[n] for n in PEERS), strict=True)],
            max(total[n] for n in PEERS),
        ),
        **{name: (per_s[name], total[name]) for name in (*PEERS, FIT, CEILING)},
    }
    cost = [1000 / ours - 1000 / fit for ours, fit in zip(per_s[OURS], per_s[FIT], strict=True)]
    return {
        "contestants": {
            name: {
                "images_per_s": _spread([s * batch for s in speeds]),
                "images_per_s_over_all": total[name] * batch,
                "per_round": [round(s * batch, 3) for s in speeds],
                "steps": [len(times) for times in windows[name]],
            }
            for name, speeds in per_s.items()
        },
        "ratios": {
            name: {
                **_spread(per_round := [ours / one for ours, one in zip(per_s[OURS], ones, strict=True)]),
                "per_round": [round(r, 4) for r in per_round],
                "over_all": total[OURS] / one_total,
            }
            for name, (ones, one_total) in others.items()
        },
        "ray_and_mlflow_ms_per_step": _spread(cost),
        "background_share": background,
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    return dict(zip(("low_quartile", "median", "high_quartile"), quartiles(values), strict=True))


def table(result: dict[str, Any]) -> list[str]:
    """The result for people."""
    case = result["case"]
    lines = [
        f"ResNet-{case['depth']}, {case['size']} pixels, global batch {case['batch']}, {case['precision']} for all, "
        f"{result['rounds']} rounds of {case['window']:g} s or more, {result['machine']['cores']} cores, "
        f"{result['machine']['cpu']}",
        f"left out of each window: the step that freezing cut, and {result['num_ahead']} more, whose batches may "
        f"have lain ready; checkpoints of ours: {result['checkpoints']}",
        f"{'':<14}{'images/s':>10}   {'quartiles':<16}{'ours / it':>10}   {'quartiles':<16}{'over all':>9}   setting",
    ]
    for name, one in result["contestants"].items():
        ratio = result["ratios"].get(name)
        compared = f"{'':>10}   {'':<16}{'':>9}" if ratio is None else _line(ratio, 3) + f"{ratio['over_all']:>9.3f}"
        lines.append(f"{name:<14}{_line(one['images_per_s'], 1)}{compared}   {result['settings'][name]}")
    cost = result["ray_and_mlflow_ms_per_step"]
    lines.append(
        f"Ray and MLflow: {_line(cost, 1).strip()} ms a step; their processes beside the ranks take "
        f"{result['background_share']:.1%} of the cores at all times, which is made good to the others"
    )
    return [*lines, *(verdict(result, name) for name in AIMS)]


def _line(spread: dict[str, float], digits: int) -> str:
    between = f"{spread['low_quartile']:.{digits}f} to {spread['high_quartile']:.{digits}f}"
    return f"{spread['median']:>10.{digits}f}   {between:<16}"


def verdict(result: dict[str, Any], name: str) -> str:
    ratio, aim = result["ratios"][name], AIMS[name]
    word = "reached" if ratio["median"] >= aim else "missed"
    return f"aim {word}: {OURS} / {name} {ratio['median']:.3f} in the median of the rounds, of {aim:g}"
