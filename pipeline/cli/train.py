"""The commands that train, and those about trainings: train, runs, report, sync, config.

The heavy imports are inside the commands, here and beside this file: torch takes seconds, `pipeline --help` should not.
"""

import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline import clock
from pipeline.cli.common import (
    DONE,
    FAILED,
    INTERRUPTED,
    Config,
    Json,
    MlflowUri,
    Outcome,
    Overrides,
    Run,
    RunData,
    Storage,
    Variables,
    checkpoint_of,
    people,
    warn,
)
from pipeline.errors import NonRetryableError, UserError

if TYPE_CHECKING:
    from pipeline.config import schema

NUM_WORST = 10  # classes that a report's summary shows


def train(
    config: Config | None = None,
    /,
    *overrides: Overrides,
    resume: str | None = None,
    needs: Variables = None,
    as_json: Json = False,
) -> Outcome:
    """Train a model, or go on with a training.

    Ctrl-C saves a checkpoint and ends. The same command with the same run.name goes on where it was, and so does
    --resume. Checkpoints and logs are in run.storage/run.name.

    Args:
        config: A YAML file; not with --resume.
        resume: A run's name, an MLflow run id, or a checkpoint's path.
        needs: Refuse to start where this environment variable is not set; may be given again. For jobs.
    """
    from pipeline.cli.console import TrainingView, format_summary
    from pipeline.cluster import supervisor
    from pipeline.failures import Interrupted, TrainingFailedError
    from pipeline.tracking import summary

    if lacking := [name for name in needs or [] if not os.environ.get(name)]:
        fix = "give it to the cluster, from a Kubernetes Secret or in the environment of `ray start`"
        raise UserError(f"{', '.join(lacking)}: not set in the environment here, and this training needs it; {fix}")
    try:
        cfg, label, resume_from = config_to_train(config, overrides, resume)
    except UserError as e:
        raise (e if resume else NonRetryableError(str(e))) from None  # a run to resume may be there the next time
    with TrainingView(people(as_json)) as view:
        try:
            result = supervisor.train(cfg, label, resume_from, view, began=clock.BEGAN)
        except TrainingFailedError as e:
            return {"status": "failed", "run": view.run, "error": str(e)}, [f"failed: {e}"], FAILED
        except Interrupted:
            end, text = {"status": "interrupted", "run": view.run, "step": view.resumes_at}, "interrupted"
            if view.resumes_at is not None:
                text = f"interrupted; go on from step {view.resumes_at} with: pipeline train --resume {view.place}"
            return end, [text], INTERRUPTED
    result = summary.complete(result)
    summary.save(result, warn)
    return result, format_summary(result), INTERRUPTED if result["status"] == "interrupted" else DONE


def config_to_train(
    config: str | None, overrides: Sequence[str], resume: str | None
) -> tuple["schema.Config", str, str | None]:
    """The configuration, the name that a new run is called after, and the checkpoint to resume from."""
    from pipeline.config import loading

    words = [config, *overrides] if config else []
    if resume is None:
        if not words or "=" in words[0]:
            raise UserError("name a config file, such as: pipeline train configs/digits.yaml; or --resume RUN")
        return loading.load(words[0], words[1:]), Path(words[0]).stem, None
    if words and "=" not in words[0]:
        raise UserError(f"--resume takes the run's own configuration; leave out {words[0]}")
    from pipeline.tracking import find

    settings = dict(map(loading.parse_override, words))
    checkpoint = find.find_to_resume(resume, settings.get("run.storage"), settings.get("mlflow.uri"), warn)
    return find.config_to_resume(checkpoint, words), "", checkpoint.place.uri


def runs(*, storage: Storage = "runs", as_json: Json = False) -> Outcome:
    """List the runs of a storage: state, best top-1, images/s, where they resume.

    States: training; done; stopped before its last step; failed for good; died: nobody trains it, and it has not ended;
    open: on an object store, either training or died; new: it has no checkpoint yet.
    """
    from pipeline.runs import listing
    from pipeline.tracking.find import open_storage

    place = open_storage(storage)
    rows = listing.listed(place)
    return [asdict(row) for row in rows], listing.table(rows) if rows else [f"no runs in {place}"], DONE


def report(
    run: Run,
    /,
    *,
    data: RunData = None,
    out: Path | None = None,
    storage: Storage = "runs",
    mlflow_uri: MlflowUri = None,
    as_json: Json = False,
) -> Outcome:
    """A run's report as one HTML page and its figures: of the newest checkpoint, or of a given one.

    Args:
        out: The folder of its files; by default report-NAME.
    """
    from pipeline.cli.console import format_report
    from pipeline.training import checkpoint_report

    checkpoint = checkpoint_of(run, storage, mlflow_uri)
    folder = out or Path(f"report-{checkpoint.place.parent.parent.name}")
    made = checkpoint_report.make_report(checkpoint, folder, data, mlflow_uri, warn)
    head, classes = made.facts.headline(), made.facts.classes
    worst = [
        {
            "class": classes[figures.label],
            "images": figures.images,
            "recall": figures.recall,
            "precision": figures.precision,
            "taken_for": classes[figures.taken_for[0]] if figures.taken_for else None,
        }
        for figures in made.facts.worst_first()[:NUM_WORST]
    ]
    has_curves = "curves.png" in made.files
    lines = [*format_report(head, worst, len(classes)), ""]
    lines += [f"{'curves' if has_curves else 'no curves'}: {made.note}"] if made.note else []
    lines += [f"not logged to MLflow: {made.not_logged}" if made.not_logged else "logged to MLflow, below report/"]
    result = {"checkpoint": str(checkpoint.place), "out": str(folder), "files": made.files, **head}
    result |= {"worst_classes": worst, "curves": has_curves}
    result |= {"curves_note": made.note or None, "not_logged": made.not_logged or None}
    return result, [str(checkpoint.place), *lines, f"open {folder / made.files[0]}"], DONE


def sync(run: Run, /, *, storage: Storage = "runs", mlflow_uri: MlflowUri = None, as_json: Json = False) -> Outcome:
    """Send what a run has not been able to log to MLflow."""
    from pipeline.runs.lock import run_lock
    from pipeline.tracking import find, sync

    place = find.find_run(run, find.open_storage(storage), mlflow_uri)
    place.local_dir.mkdir(parents=True, exist_ok=True)
    with run_lock(place, warn):
        target, run_id, waiting = sync.sync(place, warn)
    result = {"run": place.uri, "mlflow_uri": target.uri, "mlflow_run_id": run_id, "waiting": waiting}
    if waiting:
        return result, [f"MLflow at {target.uri} is away; {waiting} records of {place} wait"], FAILED
    return result, [f"MLflow at {target.uri} has all of {place}, in its run {run_id}"], DONE


def config(
    config: Config | None = None,
    /,
    *overrides: Overrides,
    explain: bool = False,
    as_json: Json = False,
) -> Outcome:
    """Print the resolved configuration, or say what the settings mean.

    Args:
        config: A YAML file; with --explain, a setting or a section, such as train.epochs or train, or nothing.
        explain: Print the meaning, the default and the bounds of settings instead.
    """
    from pipeline.config import loading, reference

    if explain:
        if overrides:
            raise UserError(f"--explain takes one setting or section; leave out {overrides[0]}")
        chosen = reference.explain(config)
        return [asdict(setting) for setting in chosen], [line for setting in chosen for line in setting.lines()], DONE
    if config is None:
        raise UserError("name a config file, such as: pipeline config configs/digits.yaml; or --explain")
    cfg = loading.load(config, overrides)
    return loading.to_dict(cfg), [loading.dump(cfg).rstrip()], DONE
