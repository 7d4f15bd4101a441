"""`pipeline report`: the report of a checkpoint at any time, from a new evaluation and what the run has left.

Curves come from MLflow, which alone has them from the first step on, and from what still waits for it: all of a
training that it never heard of.
"""

from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from pipeline.data.loading.loader import EvalLoader, LoaderContext
from pipeline.errors import UserError
from pipeline.local_files import make_folder
from pipeline.runs.checkpoint import Checkpoint
from pipeline.storage import Storage
from pipeline.tracking import backlog, mlflow_run, outbox, summary
from pipeline.tracking.mlflow_logger import FOLDER
from pipeline.tracking.mlflow_run import Target
from pipeline.tracking.mlflow_store import moved_config, reason
from pipeline.tracking.records import Metrics, Record
from pipeline.tracking.report.charts import METRICS, History
from pipeline.tracking.report.page import NUM_MISTAKES, Facts, find_mistakes, write_report
from pipeline.training.inference import evaluate_checkpoint


@dataclass(frozen=True)
class CheckpointReport:
    """A report's files in their folder, and the facts that it shows.

    note: on its curves, where they are not MLflow's or there are none. not_logged: why so; empty where it is among the
    MLflow run's artifacts.
    """

    files: list[str]
    facts: Facts
    note: str
    not_logged: str


def make_report(
    checkpoint: Checkpoint, out: Path, data: str | None, mlflow_uri: str | None, warn: Callable[[str], None]
) -> CheckpointReport:
    """Evaluate a checkpoint and write its report into `out`; log it too, if it is the run's own.

    Args:
        data: a source or an index; None: the run's own validation images.
        mlflow_uri: of the store that has the run; None: the configured one.
        warn: told where memory is short.

    Raises:
        UserError: images that cannot be evaluated, or a folder that cannot be written to.
    """
    run, cfg, meta = checkpoint.place.parent.parent, checkpoint.cfg, checkpoint.meta
    make_folder(out)
    saved = backlog.read(run)
    waiting = [*outbox.read_records(run.local_dir / FOLDER), *(saved.records if saved else [])]
    quicker = "`pipeline evaluate RUN train.precision=fp32` gives the scores sooner"
    predictions, index = evaluate_checkpoint(checkpoint.place, data, warn, fix=quicker)
    with closing(EvalLoader(index, cfg.data, LoaderContext.here(), _sound, batch=NUM_MISTAKES)) as loader:
        mistakes = find_mistakes(predictions, loader)
    # No checkpoint knows of what came after it; the summary does, where this is the last one of a training now done.
    if seconds := summary.read_seconds(run, meta["training_id"], checkpoint.step):
        meta = {**meta, "seconds": seconds, "counted": "over the whole training"}
    facts = Facts(run.name, data or cfg.data.val, meta, cfg, predictions, mistakes)
    target, logged, away = _find_logged(checkpoint, run, mlflow_uri)
    history = _with_waiting(logged, waiting)
    note = _note(away, history, run, cfg.train.log_every)
    try:
        files = write_report(facts, history, out, note)
    except OSError as e:
        raise UserError(f"--out {out}: {e.strerror or e}; name another folder") from None
    not_logged = _why_not_logged(checkpoint, data) or away
    if target is not None and not not_logged:
        try:
            to = mlflow_run.open_existing(target, follow=True)
            assert to is not None, "it was there a moment ago"
            to.log_report([out / name for name in files])
        except Exception as e:  # MLflow raises whatever its transport raises
            not_logged = f"MLflow does not take it: {reason(e)}"
    return CheckpointReport(files, facts, note, not_logged)


def _sound(place: str, reason: str) -> None:
    raise AssertionError(f"{place} was decoded a moment ago: {reason}")


def _find_logged(checkpoint: Checkpoint, run: Storage, uri: str | None) -> tuple[Target | None, History, str]:
    """Where the MLflow run is, its curves, and why there are none, if so."""
    try:
        tracked = moved_config(checkpoint.cfg.mlflow, checkpoint.cfg.run.storage, run.parent)
        target = Target.of(tracked, run, checkpoint.meta["training_id"], uri)
    except UserError as e:
        return None, {}, str(e)
    try:
        logged_run = mlflow_run.open_existing(target)
        if logged_run is None:
            return None, {}, f"MLflow at {target.uri} does not know this training; --mlflow-uri names another store"
        return target, logged_run.history(), ""
    except Exception as e:  # as above; the report goes without
        return None, {}, f"MLflow at {target.uri} does not answer: {reason(e)}"


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


def _why_not_logged(checkpoint: Checkpoint, data: str | None) -> str:
    """Why a report is not logged as the run's; empty if it is."""
    if data is not None:
        return "its images are not the run's own (--data)"
    newest = max(name for name in checkpoint.place.parent.names() if name.startswith("step_"))
    return "" if newest == checkpoint.place.name else f"{newest} is newer"
