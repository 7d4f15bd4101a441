"""What the commands about trainings do that have been: `pipeline report` and `pipeline runs`.

The heavy imports are inside the commands, as in `commands`.
"""

import argparse
from dataclasses import asdict
from pathlib import Path

from pipeline.cli.commands import DONE, Outcome, find_checkpoint, warn

NUM_WORST = 10  # classes that are shown


def report(args: argparse.Namespace) -> Outcome:
    from pipeline.cli.console import format_report
    from pipeline.training import checkpoint_report

    found = find_checkpoint(args)
    out = args.out or Path(f"report-{found.place.parent.parent.name}")
    made = checkpoint_report.report(found, out, args.data, args.mlflow_uri, warn)
    head, classes = made.facts.headline(), made.facts.classes
    worst = [
        {
            "class": classes[one.label],
            "images": one.images,
            "recall": one.recall,
            "precision": one.precision,
            "taken_for": classes[one.taken_for[0]] if one.taken_for else None,
        }
        for one in made.facts.worst_first()[:NUM_WORST]
    ]
    lines = format_report(head, worst, len(classes))
    drawn = "curves.png" in made.files
    lines += ["", *([f"{'curves' if drawn else 'no curves'}: {made.note}"] if made.note else [])]
    lines += [f"not logged to MLflow: {made.not_logged}" if made.not_logged else "logged to MLflow, below report/"]
    result = {"checkpoint": str(found.place), "out": str(out), "files": made.files, **head, "worst_classes": worst}
    result |= {"curves": drawn, "curves_note": made.note or None, "not_logged": made.not_logged or None}
    return result, [str(found.place), *lines, f"open {out / made.files[0]}"], DONE


def runs(args: argparse.Namespace) -> Outcome:
    from pipeline.runs import listing
    from pipeline.tracking.find import open_storage

    storage = open_storage(args.storage)
    found = listing.listed(storage)
    return [asdict(one) for one in found], listing.table(found) if found else [f"no runs in {storage}"], DONE
