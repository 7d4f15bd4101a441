"""Trainings of several settings with several seeds, one after the other, and the table of what they reached.

    python scripts/results.py configs/digits.yaml model.depth=18 cluster.workers=1 \\
        --case bf16 train.precision=bf16 --case fp32 train.precision=fp32 --seeds 0 1 2 --out runs/results

Each is a whole `pipeline train` of its own, by the name CONFIG-CASE-SEED in OUT; OUT/NAME.json keeps its command,
commit and summary. What is there already is not trained again, and what was interrupted is resumed. The table goes to
stdout as Markdown: one seed proves nothing, so mean and range stand beside each other.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PIPELINE = str(Path(sys.executable).with_name("pipeline"))


@dataclass(frozen=True)
class Case:
    """A row of the table: its name and its own settings, key=value."""

    name: str
    settings: tuple[str, ...]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, metavar="CONFIG", help="a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings of all cases")
    text = "a row: its name, then its own settings; may be given again"
    parser.add_argument("--case", action="append", required=True, nargs="+", metavar=("NAME", "KEY=VALUE"), help=text)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="default: 0 1 2")
    parser.add_argument("--out", type=Path, default=Path("runs/results"), metavar="DIR", help="default: %(default)s")
    args = parser.parse_args()
    cases = [Case(name, tuple(settings)) for name, *settings in args.case]
    if len({_slug(case.name) for case in cases}) < len(cases):
        parser.error("--case: two have the same name, so they would be the same runs")
    args.out.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[Any]] = {case.name: [] for case in cases}
    for seed in args.seeds:  # all cases of a seed first: what is there after an hour can be compared
        for case in cases:
            name = f"{args.config.stem}-{_slug(case.name)}-{seed}"
            settings = [*args.overrides, *case.settings, f"run.seed={seed}"]
            summary = train(name, [str(args.config), *settings], args.out)
            if summary is None:
                return 1
            found[case.name].append(summary)
    print("\n".join(table(cases, found)))
    return 0


def train(name: str, words: Sequence[str], out: Path) -> Any:
    """The summary of the training `name`, from its file in `out` or trained now; None where it failed."""
    file = out / f"{name}.json"
    if file.exists():
        kept = json.loads(file.read_text(encoding="utf-8"))
        if kept["command"] != list(words):
            print(f"{file}: is of {' '.join(kept['command'])}; choose another --out", file=sys.stderr)
            return None
        return kept["summary"]
    print(f"{name}: {' '.join(words)}", file=sys.stderr)
    places = [f"run.name={name}", f"run.storage={out.resolve()}"]
    done = subprocess.run(
        [PIPELINE, "train", *words, *places, "--json"], stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        print(f"{name}: ended with code {done.returncode}; called again, this script goes on with it", file=sys.stderr)
        return None
    summary = json.loads(done.stdout)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    kept = {"command": list(words), "commit": commit.stdout.strip(), "summary": summary}
    file.write_text(json.dumps(kept, indent=1), encoding="utf-8")
    return summary


def table(cases: Sequence[Case], found: dict[str, list[Any]]) -> list[str]:
    """Markdown: for each case the mean over its runs, and lowest to highest.

    Args:
        found: the summaries by the case's name: "top1" in 0..1, "seconds" by phase, "images_per_s".
    """
    lines = ["| | settings | runs | top-1 | seconds | images/s |", "|---|---|---|---|---|---|"]
    for case in cases:
        runs = found[case.name]
        columns = [
            case.name,
            " ".join(f"`{s}`" for s in case.settings),
            str(len(runs)),
            _spread([run["top1"] for run in runs], 4),
            _spread([sum(run["seconds"].values()) for run in runs], 0),
            _spread([run["images_per_s"] for run in runs], 1),
        ]
        lines.append(f"| {' | '.join(columns)} |")
    return lines


def _spread(values: Sequence[float], digits: int) -> str:
    return f"{statistics.mean(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


if __name__ == "__main__":
    sys.exit(main())
