"""What each command does: from its arguments to a result for programs and lines for people.

The heavy imports are inside the commands: torch takes seconds, and `pipeline --help` should not.
"""

import argparse
import os
import shutil
import sys
from contextlib import redirect_stdout, suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from pipeline import clock
from pipeline.config.loading import dump, load, parse_override, to_dict
from pipeline.config.schema import Config
from pipeline.errors import UserError

if TYPE_CHECKING:  # torch takes seconds to import
    from pipeline.runs.checkpoint import Checkpoint

DONE, FAILED, WRONG, INTERRUPTED = 0, 1, 2, 130
Outcome = tuple[Any, list[str], int]  # for --json, for people, exit code


def train(args: argparse.Namespace) -> Outcome:
    from pipeline.cli.console import TrainingView, format_summary
    from pipeline.cluster import supervisor
    from pipeline.failures import TrainingFailedError
    from pipeline.tracking import summary

    if lacking := [name for name in args.needs if not os.environ.get(name)]:
        fix = "give it to the cluster, from a Kubernetes Secret or in the environment of `ray start`"
        raise UserError(f"{', '.join(lacking)}: not set in the environment here, and this training needs it; {fix}")
    cfg, label, resume_from = config_to_train(args)
    with TrainingView(_people(args)) as view:
        try:
            result = supervisor.train(cfg, label, resume_from, view, began=clock.BEGAN)
        except TrainingFailedError as e:
            return {"status": "failed", "run": view.run, "error": str(e)}, [f"failed: {e}"], FAILED
    result = summary.complete(result)
    summary.save(result, warn)
    return result, format_summary(result), INTERRUPTED if result["status"] == "interrupted" else DONE


def config_to_train(args: argparse.Namespace) -> tuple[Config, str, str | None]:
    words = [args.config, *args.overrides] if args.config else []
    if args.resume is None:
        if not words or "=" in words[0]:
            raise UserError("name a config file, such as: pipeline train configs/digits.yaml; or --resume RUN")
        return load(words[0], words[1:]), Path(words[0]).stem, None
    if words and "=" not in words[0]:
        raise UserError(f"--resume takes the run's own configuration; leave out {words[0]}")
    from pipeline.tracking import find  # late, as in all commands: torch takes seconds to import

    settings = dict(map(parse_override, words))
    checkpoint = find.find_to_resume(args.resume, settings.get("run.storage"), settings.get("mlflow.uri"), warn)
    return find.config_to_resume(checkpoint, words), "", checkpoint.place.uri


def sync(args: argparse.Namespace) -> Outcome:
    from pipeline.runs.lock import run_lock
    from pipeline.tracking import find, sync

    storage = find.open_storage(args.storage)
    run = find.find_run(args.run, storage, args.mlflow_uri)
    run.local_dir.mkdir(parents=True, exist_ok=True)
    with run_lock(run, warn):
        target, run_id, waiting = sync.sync(run, warn)
    result = {"run": run.uri, "mlflow_uri": target.uri, "mlflow_run_id": run_id, "waiting": waiting}
    if waiting:
        return result, [f"MLflow at {target.uri} is away; {waiting} records of {run} wait"], FAILED
    return result, [f"MLflow at {target.uri} has all of {run}, in its run {run_id}"], DONE


def config(args: argparse.Namespace) -> Outcome:
    cfg = load(args.config, args.overrides)
    return to_dict(cfg), [dump(cfg).rstrip()], DONE


def index(args: argparse.Namespace) -> Outcome:
    from pipeline.cli.console import WorkView
    from pipeline.data.indexing.build import build_index
    from pipeline.data.indexing.scan import process_pool

    if args.out.is_dir():
        raise UserError(f"--out {args.out}: is a folder; name a file, such as {args.out}/train.arrow")
    parts = args.out.with_name(f"{args.out.name}.parts")
    with WorkView(sys.stderr) as view, process_pool(args.workers) as pool:
        index, report = build_index(args.source, pool=pool, parts=parts, progress=view)
    if args.verify:
        from pipeline.data.verify import verify

        with WorkView(sys.stderr) as view:
            index, report = verify(index, report, view)
    index.save(args.out)
    shutil.rmtree(parts, ignore_errors=True)
    result = _describe_index(index, report) | {
        "index": str(args.out),
        "fingerprint": index.fingerprint,
        "verified": args.verify,
        "parts": {"all": report.units, "there_already": report.reused},
    }
    lines = [f"{args.out}: {len(index)} images of {len(index.classes)} classes, {len(report.refused)} left out"]
    if report.cmyk:
        lines.append(f"{len(report.cmyk)} CMYK images, which DALI converts to RGB")
    if report.exif_rotated:
        lines.append(f"{len(report.exif_rotated)} images with an EXIF orientation, which DALI applies")
    if report.reused:
        lines.append(f"{report.reused} of {report.units} parts were there already")
    return result, [*lines, f"fingerprint {index.fingerprint}"], DONE


def pack(args: argparse.Namespace) -> Outcome:
    from pipeline.cli.console import WorkView
    from pipeline.data.indexing.build import open_index
    from pipeline.data.pack import pack, require_new

    require_new(args.out)  # before the images are looked into, which may take long
    with WorkView(sys.stderr) as view:
        index, report = open_index(args.source, progress=view)
    with WorkView(sys.stderr) as view:
        shards = pack(index, args.out, shard_mb=args.shard_mb, seed=args.seed, progress=view, warn=view.print)
    result = _describe_index(index, report) | {"out": str(args.out), "shards": shards}
    text = f"{args.out}: {len(index)} images of {len(index.classes)} classes in {len(shards)} shards"
    return result, [f"{text}, {len(report.refused)} left out"], DONE


def _describe_index(index: Any, report: Any) -> dict[str, Any]:
    """What was found in a source, for --json; what is left out also for people."""
    for image in report.refused:
        warn(f"left out {image}")
    return {
        "images": len(index),
        "classes": list(index.classes),
        "refused": [{"path": image.path, "reason": image.reason} for image in report.refused],
        "cmyk": [index.full_path(row) for row in report.cmyk],
        "exif_rotated": [index.full_path(row) for row in report.exif_rotated],
    }


def evaluate(args: argparse.Namespace) -> Outcome:
    from pipeline.cli.console import format_scores
    from pipeline.training import inference

    place = checkpoint_of(args).place
    predictions, _ = inference.evaluate_checkpoint(place, args.data, warn, views=args.tta, overrides=args.overrides)
    scores = predictions.scores()
    text = f"{format_scores(scores)}  on {scores['count']} images, tta: {args.tta}"
    return {"checkpoint": str(place), "tta": args.tta, **scores}, [str(place), text], DONE


def doctor(args: argparse.Namespace) -> Outcome:
    from pipeline.cluster.doctor.examine import NOT_GIVEN, examine

    words = [args.config, *args.overrides] if args.config else []
    if words and "=" not in words[0]:
        cfg = load(words[0], words[1:])
    else:
        cfg = load(None, [f"data.train={NOT_GIVEN}", f"data.val={NOT_GIVEN}", *words])
    with redirect_stdout(sys.stderr):  # Ray tells there of nodes that die
        checks = examine(cfg)
    status, code = ("ok", DONE) if all(check.ok for check in checks) else ("bad", FAILED)
    return {"status": status, "checks": [asdict(check) for check in checks]}, [str(check) for check in checks], code


def preview(args: argparse.Namespace) -> Outcome:
    from pipeline.data.preview import preview

    cfg = load(args.config, args.overrides)
    images = preview(cfg, args.step, args.images, args.out, warn)
    text = f"{args.out}: {len(images)} images of step {args.step}, as they enter the model"
    return {"out": str(args.out), "step": args.step, "images": images}, [text], DONE


def submit(args: argparse.Namespace) -> Outcome:
    from pipeline.cluster.jobs import client as jobs
    from pipeline.cluster.jobs import submission

    new = submission.plan(args.config, args.overrides, args.secret, args.image)
    client = jobs.connect(args.address)
    job = jobs.submit(client, new)
    warn(f"job {job} trains run {new.run}")
    if args.detach:
        return {"status": "submitted", "job": job, "run": new.run}, [jobs.how_to_go_on(client, job)], DONE
    return _follow(args, client, job)


def _follow(args: argparse.Namespace, client: Any, job: str) -> Outcome:
    """Show a job's log until it ends; the exit code is the job's, as far as it says something."""
    from pipeline.cluster.jobs import client as jobs

    out = _people(args)
    try:
        details = jobs.follow(client, job, lambda text: print(text, end="", file=out, flush=True), warn)
    except KeyboardInterrupt:
        lines = ["", f"job {job} goes on; {jobs.how_to_go_on(client, job)}"]
        return {"status": "interrupted", "job": job}, lines, INTERRUPTED
    ends = {"SUCCEEDED": ("done", DONE), "STOPPED": ("interrupted", INTERRUPTED)}
    status, code = ends.get(str(details.status), ("failed", FAILED))
    if code == FAILED and details.driver_exit_code in (WRONG, INTERRUPTED):
        code = details.driver_exit_code
    return jobs.describe(details) | {"status": status}, [f"job {job}: {details.status}"], code


def jobs(args: argparse.Namespace) -> Outcome:
    from pipeline.cluster.jobs import client as jobs

    client = jobs.connect(args.address)
    submitted = jobs.list_jobs(client)
    if args.follow:
        return _follow(args, client, jobs.find(submitted, args.follow).submission_id)
    described = [jobs.describe(job) for job in submitted]
    return described, jobs.format_jobs(described), DONE


def stop(args: argparse.Namespace) -> Outcome:
    from pipeline.cluster.jobs import client as jobs

    if (args.job is None) != args.all:
        raise UserError("name one job, such as: pipeline stop pets; or --all")
    client = jobs.connect(args.address)
    submitted = jobs.list_jobs(client)
    active = [job for job in submitted if not job.status.is_terminal()]
    names = [job.submission_id for job in (active if args.all else [jobs.find(submitted, args.job)])]
    if not names:
        return [], ["no job is active"], DONE
    warn(f"asked for a checkpoint and an end of {', '.join(names)}; waiting")
    stopped = list(jobs.stop(client, names))
    lines = [f"job {details.submission_id}: {details.status}{text and f', {text}'}" for details, text in stopped]
    return [jobs.describe(details) | {"log": text} for details, text in stopped], lines, DONE


def checkpoint_of(args: argparse.Namespace) -> "Checkpoint":
    """The checkpoint that a command's RUN means."""
    from pipeline.tracking import find

    storage = find.open_storage(args.storage)
    return find.find_checkpoint(args.run, storage, args.mlflow_uri, lambda text: warn(f"warning: {text}"))


def drop_unread() -> None:
    """Where the reader of stdout or stderr has gone, forget what waits for it: Python would end with 120 for it."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def warn(text: str) -> None:
    """Tell people, whatever goes to stdout; where nobody reads it, that ends nothing."""
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def _people(args: argparse.Namespace) -> IO[str]:
    """Where what is meant for people goes: beside the JSON, not into it."""
    return sys.stderr if args.json else sys.stdout
