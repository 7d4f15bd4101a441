"""What a training came to, as `pipeline train` tells it at its end, kept in the run's folder: summary.json.

No checkpoint knows of the time after it was taken: its own writing, the last logging, the shut-down.
"""

import json
import time
from collections.abc import Callable
from typing import Any

from pipeline.storage import Storage
from pipeline.tracking.ledger import goodput, summed_up

FILE = "summary.json"


def complete(summary: dict[str, Any]) -> dict[str, Any]:
    """What rank 0's `fit` returned, with the shut-down until now, by the phases that people read, and the goodput."""
    kept = {name: value for name, value in summary.items() if name != "ended"}
    seconds = summary["seconds"] | {"shut-down": time.time() - summary["ended"]}
    rounded = {name: round(s, 3) for name, s in summed_up(seconds).items()}
    return kept | {"seconds": rounded, "goodput": round(goodput(seconds), 4)}


def save(summary: dict[str, Any], warn: Callable[[str], None]) -> None:
    """Write a completed summary into its run's folder; where that fails, a warning says so: the training is done."""
    run = Storage(summary["run_dir"])
    try:
        run.write_bytes(FILE, json.dumps(summary, indent=1).encode())
    except OSError as e:
        warn(f"{run / FILE} is not written, a report will count until the last checkpoint: {e}")


def read_seconds(run: Storage, training_id: str, step: int) -> dict[str, float]:
    """Seconds per phase of a training that is done and ended at `step`; empty where the run's folder does not say."""
    try:
        summary = json.loads(run.read_bytes(FILE))
        ended_there = (summary["status"], summary["training_id"], summary["step"]) == ("done", training_id, step)
        return {str(name): float(s) for name, s in summary["seconds"].items()} if ended_there else {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}  # of an earlier version, killed before its end, or damaged; stores may refuse what is not there
