"""The command line. Exit codes: 0 done, 1 the job failed, 2 the request was wrong, 130 interrupted."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from pipeline.config import Config, ConfigError
from pipeline.settings import dump, load, parse_override, to_dict

DONE, FAILED, WRONG, INTERRUPTED = 0, 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    args = _parse(argv)
    try:
        result, lines, code = args.command(args)
    except ConfigError as e:
        print(f"pipeline: {e}", file=sys.stderr)
        if args.json:
            print(json.dumps({"status": "wrong", "error": str(e)}))
        return WRONG
    except KeyboardInterrupt:
        print("pipeline: interrupted", file=sys.stderr)
        if args.json:
            print(json.dumps({"status": "interrupted"}))
        return INTERRUPTED
    try:
        for line in [json.dumps(result)] if args.json else lines:
            print(line, flush=True)
    except BrokenPipeError:  # the reader has gone; Python would complain once more when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return int(code)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse, with KEY=VALUE also after an option, where argparse gives up on positionals."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    if any(word.startswith("-") or not hasattr(args, "overrides") for word in rest):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides += rest
    return args


Outcome = tuple[Any, list[str], int]  # for --json, for people, exit code


def _train(args: argparse.Namespace) -> Outcome:
    from pipeline import supervise
    from pipeline.console import TrainingView, summary_lines

    cfg, label, resume_from = _config_to_train(args)
    with TrainingView(_people(args)) as view:
        try:
            summary = supervise.train(cfg, label, resume_from, view)
        except supervise.TrainingFailedError as e:
            return {"status": "failed", "run": view.run, "error": str(e)}, [f"failed: {e}"], FAILED
    summary["seconds"]["launch"] = round(max(0.0, view.ready_s - summary["seconds"]["start-up"]), 3)
    code = INTERRUPTED if summary["status"] == "interrupted" else DONE
    return summary, summary_lines(summary), code


def _config_to_train(args: argparse.Namespace) -> tuple[Config, str, str | None]:
    words = [args.config, *args.overrides] if args.config else []
    if args.resume is None:
        if not words or "=" in words[0]:
            raise ConfigError("name a config file, such as: pipeline train configs/digits.yaml; or --resume RUN")
        return load(words[0], words[1:]), Path(words[0]).stem, None
    if words and "=" not in words[0]:
        raise ConfigError(f"--resume takes the run's own configuration; leave out {words[0]}")
    from pipeline import runs  # late, as in all commands: torch takes seconds to import

    given = dict(map(parse_override, words))
    found = runs.find(args.resume, runs.open_storage(given.get("run.storage", "runs")), given.get("mlflow.uri"))
    cfg = runs.config_to_resume(found, words)
    return cfg, "", found.place.uri


def _sync(args: argparse.Namespace) -> Outcome:
    from pipeline import runs, tracking
    from pipeline.identity import Identity

    storage = runs.open_storage(args.storage)
    run = runs.find_run(args.run, storage, args.mlflow_uri)
    if run is None:
        raise runs.no_such_run(args.run, storage)

    def report(text: str) -> None:
        print(text, file=sys.stderr)

    with runs.held(run, lambda event: report(event["text"])):
        last = Identity.read(run, report)
        target, run_id, waiting = tracking.sync(run.scratch / "mlflow", report, ended=last is None or not last.open)
    result = {"run": run.uri, "mlflow_uri": target.uri, "mlflow_run_id": run_id, "waiting": waiting}
    if waiting:
        return result, [f"MLflow at {target.uri} is away; {waiting} records of {run} wait"], FAILED
    return result, [f"MLflow at {target.uri} has all of {run}, in its run {run_id}"], DONE


def _config(args: argparse.Namespace) -> Outcome:
    cfg = load(args.config, args.overrides)
    return to_dict(cfg), [dump(cfg).rstrip()], DONE


def _index(args: argparse.Namespace) -> Outcome:
    from pipeline.data.index import build_index

    index, refused = build_index(args.source)
    index.save(args.out)
    for one in refused:
        print(f"left out {one}", file=sys.stderr)
    result = {
        "index": str(args.out),
        "images": len(index),
        "classes": list(index.classes),
        "fingerprint": index.fingerprint,
        "refused": [{"path": one.path, "reason": one.reason} for one in refused],
    }
    text = f"{args.out}: {len(index)} images of {len(index.classes)} classes, {len(refused)} left out"
    return result, [text, f"fingerprint {index.fingerprint}"], DONE


def _evaluate(args: argparse.Namespace) -> Outcome:
    from pipeline import infer, runs

    found = runs.find(args.run, runs.open_storage(args.storage), args.mlflow_uri)
    scores = infer.evaluate_checkpoint(found.place, args.data)
    figures = f"top-1 {scores['top1']:.4f}  top-5 {scores['top5']:.4f}  loss {scores['loss']:.4f}"
    text = f"{figures}  on {int(scores['count'])} images"
    return {"checkpoint": str(found.place), **scores}, [str(found.place), text], DONE


def _predict(args: argparse.Namespace) -> Outcome:
    from pipeline import infer, runs

    found = runs.find(args.run, runs.open_storage(args.storage), args.mlflow_uri)
    predictions = infer.predict(found.place, args.images, args.top)
    lines = []
    for one in predictions:
        if "error" in one:
            print(f"{one['image']}: {one['error']}", file=sys.stderr)
        else:
            lines.append(f"{one['image']}  " + "  ".join(f"{t['class']} {t['probability']:.4f}" for t in one["top"]))
    code = WRONG if any("error" in one for one in predictions) else DONE
    return {"checkpoint": str(found.place), "predictions": predictions}, lines, code


def _people(args: argparse.Namespace) -> IO[str]:
    """Where what is meant for people goes: beside the JSON, not into it."""
    return sys.stderr if args.json else sys.stdout


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pipeline", description="Exact, fault-tolerant training of image classifiers."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, function: Any, text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("--json", action="store_true", help="one JSON object on stdout, all else on stderr")
        command.set_defaults(command=function)
        return command

    def add_run(command: argparse.ArgumentParser) -> None:
        command.add_argument("run", metavar="RUN", help="a run's name, an MLflow run id, or a checkpoint's path")
        command.add_argument("--storage", default="runs", metavar="PLACE", help="the directory or URI where runs lie")
        command.add_argument("--mlflow-uri", metavar="URI", help="the store that an MLflow run id is looked up in")

    train = add("train", _train, "Train; a run.name used before resumes that run.")
    train.add_argument("config", nargs="?", metavar="CONFIG", help="a YAML file (not with --resume)")
    train.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings, such as train.epochs=3")
    train.add_argument("--resume", metavar="RUN", help="a run's name, an MLflow run id, or a checkpoint's path")

    sync = add("sync", _sync, "Send what a run has not been able to log to MLflow.")
    add_run(sync)

    config = add("config", _config, "Print the resolved configuration.")
    config.add_argument("config", metavar="CONFIG", help="a YAML file")
    config.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings, such as train.epochs=3")

    index = add("index", _index, "Index a folder of CLASS/image files, and list what cannot be trained on.")
    index.add_argument("source", type=Path, metavar="SRC", help="the folder")
    index.add_argument("--out", type=Path, required=True, metavar="FILE", help="the index file; give it as data.train")

    evaluate = add(
        "evaluate", _evaluate, "Exact top-1, top-5 and loss of a run's newest checkpoint, or of a given one."
    )
    add_run(evaluate)
    evaluate.add_argument(
        "--data", type=Path, metavar="PATH", help="a folder or an index; the run's own val by default"
    )

    predict = add("predict", _predict, "Class and probability of images, by a run's newest checkpoint or a given one.")
    add_run(predict)
    predict.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="image files")
    predict.add_argument("--top", type=int, default=1, metavar="K", help="the K likeliest classes")
    return parser
