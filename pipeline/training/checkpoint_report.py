"""`pipeline report`: the report of a checkpoint at any time, from a new evaluation and what the run has left.

Curves come from MLflow, which alone has them from the first step on, and from what still waits for it: all of a
training that it never heard of.
"""

from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config.loading import load
from pipeline.data.loading.loader import EvalLoader, LoaderContext
from pipeline.errors import UserError
from pipeline.runs import checkpoint
from pipeline.runs.checkpoint import Checkpoint
from pipeline.storage import Storage, make_folder
from pipeline.tracking import backlog, mlflow_run, mlflow_store, outbox, summary
from pipeline.tracking.mlflow_logger import FOLDER
from pipeline.tracking.mlflow_run import MlflowRun, Target
from pipeline.tracking.records import Metrics, Record
from pipeline.tracking.report.charts import METRICS, History
from pipeline.tracking.report.page import NUM_MISTAKES, Facts, find_mistakes, write_report
from pipeline.training.inference import evaluate_checkpoint


@dataclass(frozen=True)
class Made:
    """A report: its files in the folder `out`, and the facts that it shows.

    note: on its curves, where they are not MLflow's or there are none. not_logged: why so; empty where it is among the
    MLflow run's artifacts.
    """

    out: Path
    files: list[str]
    facts: Facts
    note: str
    not_logged: str


def report(found: Checkpoint, out: Path, data: str | None, mlflow_uri: str | None, warn: Callable[[str], None]) -> Made:
    """Evaluate a checkpoint and write its report into `out`; log it too, if it is the run's own.

    Args:
        data: a source or an index; None: the run's own validation images.
        mlflow_uri: of the store that has the run; None: the configured one.
        warn: told where memory is short.

    Raises:
        UserError: images that cannot be evaluated, or a folder that cannot be written to.
    """
    run, cfg = found.place.parent.parent, load(found.file(checkpoint.CONFIG))
    make_folder(out)
    saved = backlog.read(run)
    waiting = [*outbox.read_records(run.local_dir / FOLDER), *(saved.records if saved else [])]
    quicker = "`pipeline evaluate RUN train.precision=fp32` gives the scores sooner"
    said, index = evaluate_checkpoint(found.place, data, warn, fix=quicker)
    with closing(EvalLoader(index, cfg.data, LoaderContext.here(), _sound, batch=NUM_MISTAKES)) as loader:
        mistakes = find_mistakes(said, loader)
    facts = Facts(run.name, data or cfg.data.val, found.meta | _whole_time(found, run), cfg, said, mistakes)
    kept, logged, away = _logged(found, run, cfg.mlflow.experiment, mlflow_uri or cfg.mlflow.uri)
    history = _with_waiting(logged, waiting)
    note = _note(away, history, run, cfg.train.log_every)
    try:
        files = write_report(facts, history, out, note)
    except OSError as e:
        raise UserError(f"--out {out}: {e.strerror or e}; name another folder") from None
    return Made(out, files, facts, note, _why_not(found, data) or _log(kept, out, files) or away)


def _sound(place: str, reason: str) -> None:
    raise AssertionError(f"{place} was decoded a moment ago: {reason}")


def _whole_time(found: Checkpoint, run: Storage) -> dict[str, Any]:
    """In the place of the checkpoint's, where it is the last one of a training that is done."""
    seconds = summary.read_seconds(run, found.meta["training_id"], found.step)
    return {"seconds": seconds, "counted": "over the whole training"} if seconds else {}


def _logged(found: Checkpoint, run: Storage, experiment: str, uri: str | None) -> tuple[MlflowRun | None, History, str]:
    """The MLflow run, its curves, and why there are none, if so."""
    try:
        target = Target(mlflow_store.tracking_uri(uri, run.parent), experiment, run.uri, found.meta["training_id"])
    except UserError as e:
        return None, {}, str(e)
    try:
        kept = mlflow_run.open_existing(target)
        if kept is None:
            return None, {}, f"MLflow at {target.uri} does not know this training; --mlflow-uri names another store"
        return kept, kept.history(), ""
    except Exception as e:  # MLflow raises whatever its transport raises; the report goes without
        return None, {}, f"MLflow at {target.uri} does not answer: {mlflow_store.reason(e)}"


def _with_waiting(logged: History, waiting: Iterable[Record]) -> History:
    """The curves that MLflow has, with what it has not got yet."""
    points = {metric: dict(logged.get(metric, ())) for metric in METRICS}
    for record in waiting:
        if isinstance(record, Metrics):
            for metric in record.values.keys() & points.keys():
                points[metric][record.step] = record.values[metric]
    return {metric: sorted(curve.items()) for metric, curve in points.items() if curve}


def _note(away: str, history: History, run: Storage, log_every: int) -> str:
    """Where the curves are from, if not from MLflow, or why there are none."""
    if not away:
        return ""
    if not history:
        return f"{away}, and nothing waits for it here"
    first = min(curve[0][0] for curve in history.values())
    since = f", from step {first:,} on (MLflow got what came before)" if first > log_every else ""
    return f"drawn from what {run} keeps for MLflow{since}: {away}"


def _log(kept: MlflowRun | None, out: Path, files: list[str]) -> str:
    """Log the files; why that fails, if so."""
    if kept is None:
        return ""
    try:
        kept.log_report([out / name for name in files])
    except Exception as e:  # as above
        return f"MLflow does not take it: {mlflow_store.reason(e)}"
    return ""


def _why_not(found: Checkpoint, data: str | None) -> str:
    """Why a report is not logged as the run's; empty if it is."""
    if data is not None:
        return "of other images"
    newest = max(name for name in found.place.parent.names() if name.startswith("step_"))
    return "" if newest == found.place.name else f"{newest} is newer"
