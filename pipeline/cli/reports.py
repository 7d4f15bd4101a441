"""What the commands about trainings do that have been: `pipeline report` and `pipeline runs`.

The heavy imports are inside the commands, as in `commands`.
"""

import argparse
from dataclasses import asdict
from pathlib import Path

from pipeline.cli.commands import DONE, Outcome, checkpoint_of, warn

NUM_WORST = 10  # classes that are shown


def report(args: argparse.Namespace) -> Outcome:
    from pipeline.cli.console import format_report
    from pipeline.training import checkpoint_report

    checkpoint = checkpoint_of(args)
    out = args.out or Path(f"report-{checkpoint.place.parent.parent.name}")
    report = checkpoint_report.make_report(checkpoint, out, args.data, args.mlflow_uri, warn)
    head, classes = report.facts.headline(), report.facts.classes
    worst = [
        {
            "class": classes[figures.label],
            "images": figures.images,
            "recall": figures.recall,
            "precision": figures.precision,
            "taken_for": classes[figures.taken_for[0]] if figures.taken_for else None,
        }
        for figures in report.facts.worst_first()[:NUM_WORST]
    ]
    has_curves = "curves.png" in report.files
    lines = [*format_report(head, worst, len(classes)), ""]
    lines += [f"{'curves' if has_curves else 'no curves'}: {report.note}"] if report.note else []
    lines += [f"not logged to MLflow: {report.not_logged}" if report.not_logged else "logged to MLflow, below report/"]
    result = {"checkpoint": str(checkpoint.place), "out": str(out), "files": report.files, **head}
    result |= {"worst_classes": worst, "curves": has_curves}
    result |= {"curves_note": report.note or None, "not_logged": report.not_logged or None}
    return result, [str(checkpoint.place), *lines, f"open {out / report.files[0]}"], DONE


def runs(args: argparse.Namespace) -> Outcome:
    from pipeline.runs import listing
    from pipeline.tracking.find import open_storage

    storage = open_storage(args.storage)
    rows = listing.listed(storage)
    return [asdict(row) for row in rows], listing.table(rows) if rows else [f"no runs in {storage}"], DONE
