"""The command line. Exit codes: 0 done, 1 the command failed, 2 the request was wrong, 130 interrupted."""

from pipeline import clock  # noqa: F401  first, since it takes the time

# isort: split
import argparse
import json
import math
import re
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from pipeline import environment, machine
from pipeline.cli import bench, commands, models, reports
from pipeline.cli.commands import FAILED, INTERRUPTED, WRONG
from pipeline.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    if argv is None:
        environment.restart_interpreter()
    try:
        return _run(_parse(argv))
    finally:
        commands.drop_unread()


def _run(args: argparse.Namespace) -> int:
    try:
        result, lines, code = args.command(args)
    except UserError as e:
        return _give_up(args, WRONG, {"status": "wrong", "error": str(e)})
    except OSError as e:  # a storage that does not answer, a full disk
        return _give_up(args, FAILED, {"status": "failed", "error": str(e)})
    except KeyboardInterrupt:
        return _give_up(args, INTERRUPTED, {"status": "interrupted"})
    try:
        for line in [json.dumps(result)] if args.json else lines:
            print(line, flush=True)
    except BrokenPipeError:
        return int(code)
    except OSError as e:  # a full disk; a training has ended well all the same
        commands.warn(f"pipeline: the result cannot be written: {e.strerror}")
        return int(code) if args.command is commands.train else FAILED
    return int(code)


def _give_up(args: argparse.Namespace, code: int, result: dict[str, str]) -> int:
    commands.warn(f"pipeline: {result.get('error', result['status'])}")
    with suppress(OSError):  # nobody reads: the exit code says it
        if args.json:
            print(json.dumps(result), flush=True)
    return code


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse, with KEY=VALUE also after an option, where argparse gives up on positionals."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    if any(word.startswith("-") or not hasattr(args, "overrides") for word in rest):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides += rest
    return args


SOURCES = "a folder of CLASS/image files, of tar shards or of Parquet files; or DIR/train-{000..146}.tar; a path or URI"

NEEDS = "refuse to start where this environment variable is not set"
SECRET = (
    "an environment variable that the job needs and the cluster's own environment has, from a Kubernetes Secret or of "
    "`ray start`; only the name is sent, since everyone who may ask Ray sees a job's command line and environment"
)


def _count(text: str, low: int = 1) -> int:
    """A whole number of an option."""
    if not text.isdecimal() or int(text) < low:
        raise argparse.ArgumentTypeError(f"{text}: must be a whole number, at least {low}")
    return int(text)


def _counts(text: str) -> list[int]:
    """Whole numbers of an option, separated by commas."""
    return [_count(word) for word in text.split(",")]


def _positive(text: str) -> float:
    """A number of an option that is no nonsense as a speed."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 1e-3 <= value <= 1e7:
        raise argparse.ArgumentTypeError(f"{text}: must be a number, at least 0.001 and at most 1e7")
    return value


def _variable(text: str) -> str:
    """An environment variable's name, in an option that takes no value; what else was given is not repeated."""
    if re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", text) is None:
        raise argparse.ArgumentTypeError("give the name of an environment variable, without its value")
    return text


class _Parser(argparse.ArgumentParser):
    """Ends with its own exit code also where nobody reads what it says, as argparse itself does in later versions."""

    def _print_message(self, message: str, file: Any = None) -> None:
        with suppress(OSError):
            super()._print_message(message, file)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="pipeline", description="Exact, fault-tolerant training of image classifiers.")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, function: Any, text: str, to: Any = subparsers) -> argparse.ArgumentParser:
        command: argparse.ArgumentParser = to.add_parser(name, help=text, description=text)
        command.add_argument("--json", action="store_true", help="one JSON object on stdout, all else on stderr")
        command.set_defaults(command=function)
        return command

    def add_storage(command: argparse.ArgumentParser) -> None:
        command.add_argument("--storage", default="runs", metavar="PLACE", help="the directory or URI where runs lie")

    def add_run(command: argparse.ArgumentParser, data: bool = False) -> None:
        command.add_argument("run", metavar="RUN", help="a run's name, an MLflow run id, or a checkpoint's path")
        add_storage(command)
        command.add_argument("--mlflow-uri", metavar="URI", help="the store that an MLflow run id is looked up in")
        if data:
            command.add_argument("--data", metavar="SRC", help=f"{SOURCES}, or an index; the run's own val by default")

    def add_config(command: argparse.ArgumentParser, optional: str = "") -> None:
        number = "?" if optional else None
        command.add_argument("config", nargs=number, metavar="CONFIG", help=f"a YAML file{optional}")
        command.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings, such as train.epochs=3")

    def add_address(command: argparse.ArgumentParser) -> None:
        text = "of the cluster's dashboard, such as http://HEAD:8265; by default $RAY_API_SERVER_ADDRESS"
        command.add_argument("--address", metavar="URL", help=text)

    train = add("train", commands.train, "Train; a run.name used before resumes that run.")
    add_config(train, optional=" (not with --resume)")
    train.add_argument("--resume", metavar="RUN", help="a run's name, an MLflow run id, or a checkpoint's path")
    train.add_argument("--needs", action="append", default=[], type=_variable, metavar="NAME", help=NEEDS)

    submit = add("submit", commands.submit, "Train on a Ray cluster, as a job, and follow its log; resumes like train.")
    add_config(submit)
    add_address(submit)
    submit.add_argument("--image", action="store_true", help="use the cluster's image as it is; CONFIG is a path in it")
    submit.add_argument("--detach", action="store_true", help="do not wait for the job's end")
    submit.add_argument("--secret", action="append", default=[], type=_variable, metavar="NAME", help=SECRET)

    jobs = add("jobs", commands.jobs, "List the jobs of a Ray cluster, or follow the log of one.")
    add_address(jobs)
    jobs.add_argument("--follow", metavar="JOB", help="a job's id, or a run's name: its newest job")

    stop = add("stop", commands.stop, "Have a job save a checkpoint and end, and wait for that.")
    stop.add_argument("job", nargs="?", metavar="JOB", help="a job's id, or a run's name: its newest job")
    stop.add_argument("--all", action="store_true", help="every active job")
    add_address(stop)

    sync = add("sync", commands.sync, "Send what a run has not been able to log to MLflow.")
    add_run(sync)

    doctor = add("doctor", commands.doctor, "Say whether a cluster can train a configuration, and what to fix if not.")
    text = "look at the cluster of cluster.address or $RAY_ADDRESS, else at this machine as one; always to be given"
    doctor.add_argument("--cluster", action="store_true", required=True, help=text)
    add_config(doctor, optional="; by default no data is read")

    config = add("config", commands.config, "Print the resolved configuration.")
    add_config(config)

    preview = add("preview", commands.preview, "Show the images of a step as the model sees them, with their labels.")
    add_config(preview)
    preview.add_argument("--out", type=Path, required=True, metavar="FILE", help="the picture, such as grid.png")
    preview.add_argument("--step", type=partial(_count, low=0), default=0, metavar="N", help="steps done (default 0)")
    preview.add_argument("--images", type=_count, default=64, metavar="K", help="at most (default 64)")

    text = "Index images, and list what cannot be trained on; goes on where it was interrupted."
    index = add("index", commands.index, text)
    index.add_argument("source", metavar="SRC", help=SOURCES)
    index.add_argument("--out", type=Path, required=True, metavar="FILE", help="the index file; give it as data.train")
    cores = machine.cpu_count()
    index.add_argument("--workers", type=_count, default=cores, metavar="N", help="processes; by default all cores")
    index.add_argument("--verify", action="store_true", help="decode every image, and leave out what is broken")

    text = "Pack images into WebDataset tar shards, in a shuffled order; the same bytes each time."
    pack = add("pack", commands.pack, text)
    pack.add_argument("source", metavar="SRC", help=f"{SOURCES}, or an index")
    pack.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder of the shards, to be made")
    pack.add_argument("--shard-mb", type=_count, default=256, metavar="MB", help="size of a shard (default 256)")
    pack.add_argument("--seed", type=partial(_count, low=0), default=0, metavar="S", help="of the order (default 0)")

    text = "Measure how fast this machine is at a part of training."
    parts = subparsers.add_parser("bench", help=text, description=text).add_subparsers(required=True, metavar="PART")

    def add_bench(
        name: str, function: Any, text: str, rounds: int, timed: int, unit: str = "--steps"
    ) -> argparse.ArgumentParser:
        command = add(name, function, text, parts)
        add_config(command)
        command.add_argument("--rounds", type=_count, default=rounds, metavar="R", help=f"(default {rounds})")
        command.add_argument(unit, type=_count, default=timed, metavar="N", help=f"timed in a round (default {timed})")
        command.add_argument("--out", type=Path, metavar="DIR", help=f"for {name}.json and a plot, {name}.png")
        return command

    text = "images/s of the loader beside torchvision's and timm's, by turns, on the CPU."
    loader = add_bench("loader", bench.loader, text, 7, 2048, "--images")
    loader.add_argument("--cores", type=_count, metavar="N", help="for each loader; by default all")
    text = "images/s of the bare step on synthetic data, the part of the peak that this is, and what would help."
    step = add_bench("step", bench.step, text, 7, 3)
    text = "a setting to compare with, by turns, such as model.compile=default; may be given again"
    step.add_argument("--try", action="append", default=[], dest="tries", metavar="KEY=VALUE", help=text)
    text = "images/s through data, training and logging beside the bare step on synthetic data, by turns."
    for command in (step, add_bench("train", bench.train, text, 10, 10)):
        command.add_argument("--threads", type=_count, metavar="N", help="for computing; by default all cores")
    text = "images/s of whole trainings through Ray with more and more workers, by turns."
    scale = add_bench("scale", bench.scale, text, 3, 20)
    text = "numbers of workers, separated by commas (default 1,2)"
    scale.add_argument("--workers", type=_counts, default=[1, 2], metavar="N,N", help=text)

    plan = add("plan", bench.plan, "Predict images/s, hours, goodput and cost on 8 to 1,024 GPUs, on paper.")
    add_config(plan)
    plan.add_argument("--gpus", type=_count, required=True, metavar="N", help="how many, such as 64")
    plan.add_argument("--gpu", required=True, metavar="CARD", help="H100, A100, ... (a wrong one lists all)")
    text = "weak scaling: so many images on each GPU; by default train.global_batch is kept"
    plan.add_argument("--batch-per-gpu", type=_count, metavar="N", help=text)
    plan.add_argument("--images", type=_count, metavar="N", help="of data.train; by default its index's, or ImageNet's")
    text = "of one GPU alone at a large batch, as measured; by default modelled"
    plan.add_argument("--images-per-s-per-gpu", type=_positive, metavar="R", help=text)
    text = "replace a number that the plan rests on; the answer lists all; may be given again"
    plan.add_argument("--assume", action="append", default=[], metavar="NAME=VALUE", help=text)
    text = "the JSON of `pipeline bench scale`: predict its efficiency from one worker's figures"
    plan.add_argument("--measured", type=Path, metavar="FILE", help=text)

    text = "Exact top-1, top-5 and loss of a run's newest checkpoint, or of a given one."
    evaluate = add("evaluate", commands.evaluate, text)
    add_run(evaluate, data=True)
    evaluate.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings, such as data.val_size=288")
    text = "of each image, averaged: itself, with its mirror image, or the ten crops of He et al. 2015"
    evaluate.add_argument("--tta", choices=["one", "flip", "ten"], default="one", help=text)

    text = "A run's report as one HTML page and its figures: of the newest checkpoint, or of a given one."
    report = add("report", reports.report, text)
    add_run(report, data=True)
    report.add_argument("--out", type=Path, metavar="DIR", help="the folder of its files (default report-NAME)")

    text = "List the runs of a storage: state, best top-1, images/s, where they resume."
    runs = add("runs", reports.runs, text)
    add_storage(runs)

    text = "Class and probability of images, by a run's newest checkpoint or a given one."
    predict = add("predict", models.predict, text)
    add_run(predict)
    text = "image files; folders, whose images at any depth are meant; - for such paths on stdin, one a line"
    predict.add_argument("images", nargs="+", metavar="PATH", help=text)
    predict.add_argument("--top", type=int, default=1, metavar="K", help="the K likeliest classes")
    predict.add_argument("--csv", action="store_true", help="a table with a header on stdout, a line for each image")

    text = "Write the model of a run's newest checkpoint, or of a given one, to a file that runs without this package."
    export = add("export", models.export, text)
    add_run(export)
    text = "onnx, or pt2 for torch.export.load"
    export.add_argument("--format", required=True, metavar="onnx|pt2", help=text)
    export.add_argument("--out", type=Path, required=True, metavar="FILE", help="the file to be written")

    text = "Put the model of a run's newest checkpoint, or of a given one, into MLflow's Model Registry, to be served."
    register = add("register", models.register, text)
    add_run(register)
    register.add_argument("name", metavar="NAME", help="of the registered model, of which it becomes a new version")
    return parser
