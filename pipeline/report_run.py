"""`pipeline report`: the report of a checkpoint at any time, from a new evaluation and what MLflow has of the run."""

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from pipeline import checkpoint, mlflow_run
from pipeline.charts import History
from pipeline.checkpoint import Checkpoint
from pipeline.config import ConfigError
from pipeline.data.loader import EvalLoader, Place
from pipeline.figures import open_folder
from pipeline.infer import evaluate_checkpoint
from pipeline.mlflow_run import MlflowRun, Target
from pipeline.report import NUM_MISTAKES, Facts, find_mistakes, write_report
from pipeline.settings import load
from pipeline.storage import Storage


@dataclass(frozen=True)
class Made:
    """A report: its files in the folder `out`, and the facts that it shows.

    no_curves, not_logged: why so; empty where it has curves, or is among the MLflow run's artifacts.
    """

    out: Path
    files: list[str]
    facts: Facts
    no_curves: str
    not_logged: str


def report(found: Checkpoint, out: Path, data: str | None, mlflow_uri: str | None, say: Callable[[str], None]) -> Made:
    """Evaluate a checkpoint and write its report into `out`; log it too, if it is the run's own.

    Args:
        data: a source or an index; None: the run's own validation images.
        mlflow_uri: of the store that has the run; None: the configured one.
        say: told where memory is short.

    Raises:
        ConfigError: images that cannot be evaluated, or a folder that cannot be written to.
    """
    run, cfg = found.place.parent.parent, load(found.path / checkpoint.CONFIG)
    open_folder(out)
    said, index = evaluate_checkpoint(found.place, data, say)
    with closing(EvalLoader(index, cfg.data, Place.here(), _sound, batch=NUM_MISTAKES)) as loader:
        mistakes = find_mistakes(said, loader)
    facts = Facts(run.name, data or cfg.data.val, found.meta, cfg, said, mistakes)
    kept, history, no_curves = _history(found, run, cfg.mlflow.experiment, mlflow_uri or cfg.mlflow.uri)
    try:
        files = write_report(facts, history, out, no_curves)
    except OSError as e:
        raise ConfigError(f"--out {out}: {e.strerror or e}; name another folder") from None
    return Made(out, files, facts, no_curves, _why_not(found, data) or _log(kept, out, files) or no_curves)


def _sound(place: str, reason: str) -> None:
    raise AssertionError(f"{place} was decoded a moment ago: {reason}")


def _history(
    found: Checkpoint, run: Storage, experiment: str, uri: str | None
) -> tuple[MlflowRun | None, History | None, str]:
    """The MLflow run, its curves, and why there are none, if so."""
    try:
        target = Target(mlflow_run.tracking_uri(uri, run.parent), experiment, run.uri, found.meta["training_id"])
    except ConfigError as e:
        return None, None, str(e)
    try:
        kept = mlflow_run.reopen(target)
        if kept is None:
            return None, None, f"MLflow at {target.uri} does not know this training; --mlflow-uri names another store"
        return kept, kept.history(), ""
    except Exception as e:  # MLflow raises whatever its transport raises; the report goes without
        return None, None, f"MLflow at {target.uri} does not answer: {mlflow_run.reason(e)}"


def _log(kept: MlflowRun | None, out: Path, files: list[str]) -> str:
    """Log the files; why that fails, if so."""
    if kept is None:
        return ""
    try:
        kept.log_report([out / name for name in files])
    except Exception as e:  # as above
        return f"MLflow does not take it: {mlflow_run.reason(e)}"
    return ""


def _why_not(found: Checkpoint, data: str | None) -> str:
    """Why a report is not logged as the run's; empty if it is."""
    if data is not None:
        return "of other images"
    newest = max(name for name in found.place.parent.names() if name.startswith("step_"))
    return "" if newest == found.place.name else f"{newest} is newer"
