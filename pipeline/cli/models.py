"""What the commands that put a trained model to use do: predict, export, register. See `commands`."""

import argparse
import csv
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.cli.commands import DONE, FAILED, WRONG, Outcome, checkpoint_of, warn
from pipeline.errors import UserError

NUM_COMPARED = 16  # images that an exported model is compared on


def predict(args: argparse.Namespace) -> Outcome:
    from pipeline.training import inference

    if args.csv and args.json:
        raise UserError("--csv: does not go with --json; choose one of them")
    images = _find_images(args.images)
    place = checkpoint_of(args).place
    predictions: list[dict[str, Any]] = []
    show = predictions.append if args.json else _csv_writer(args.top) if args.csv else _print
    code = DONE
    with suppress(BrokenPipeError):  # the reader has had enough, as `head` has
        for prediction in inference.predict(place, images, args.top, warn):
            if "error" in prediction:
                code = WRONG
                warn(f"{prediction['image']}: {prediction['error']}")
            show(prediction)
    return {"checkpoint": str(place), "predictions": predictions}, [], code


def _find_images(names: list[str]) -> list[Path]:
    """The image files that are meant by paths of files and folders, and by "-", which stands for more of these."""
    from pipeline.data.indexing.find import images_at

    paths = [path for name in names for path in (_read_names() if name == "-" else [name])]
    if not paths:
        raise UserError("-: stdin names no image; give it paths, one a line")
    return [image for path in paths for image in images_at(Path(path))]


def _read_names() -> Iterator[str]:
    for line in sys.stdin.buffer:
        if name := os.fsdecode(line.rstrip(b"\r\n")):
            yield name


def _print(prediction: dict[str, Any]) -> None:
    if "error" not in prediction:
        likeliest = "  ".join(f"{t['class']} {t['probability']:.4f}" for t in prediction["top"])
        print(f"{prediction['image']}  {likeliest}", flush=True)


def _csv_writer(top: int) -> Callable[[dict[str, Any]], None]:
    """Writes predictions to stdout, after a header; what comes after the likeliest class stands behind the error."""
    more = [f"{name}_{k}" for k in range(2, top + 1) for name in ("class", "probability")]
    table = csv.DictWriter(sys.stdout, ["image", "class", "probability", "error", *more], lineterminator="\n")
    has_header = False

    def write(prediction: dict[str, Any]) -> None:
        nonlocal has_header
        if not has_header:  # not before: the request may turn out to be wrong
            table.writeheader()
        has_header = True
        others = [f"{t[name]}" for t in prediction.get("top", [])[1:] for name in ("class", "probability")]
        likeliest = {key: value for key, value in prediction.items() if key != "top"}
        table.writerow(likeliest | dict(zip(more, others, strict=False)))
        sys.stdout.flush()

    return write


def export(args: argparse.Namespace) -> Outcome:
    from pipeline.models import export, pretrained
    from pipeline.training import inference

    export.require_writable(args.format, args.out)
    place = checkpoint_of(args).place
    model, cfg, classes = pretrained.load_model(place)
    notes = export.make_notes(cfg, classes, place.name)
    images, source = inference.some_images(cfg, NUM_COMPARED)
    compared = {"images": len(images), "of": source, "tolerance": export.TOLERANCE}
    result = {"checkpoint": str(place), "out": str(args.out), "format": args.format, "compared": compared}
    try:
        difference = export.export(model, notes, images, args.format, args.out)
    except export.ExportError as e:
        text = f"{args.out} is not written: {e}"
        return result | {"status": "failed", "error": text}, [f"failed: {text}"], FAILED
    compared |= {"batches": (1, len(images)), "largest_difference": difference}
    size, num_bytes = notes["size"], args.out.stat().st_size
    lines = [
        str(place),
        f"{args.out}: {args.format}, {num_bytes / 2**20:.1f} MB; "
        f"images uint8 (N, 3, {size}, {size}) -> logits float32 (N, {len(classes)}), N from 1 up",
        f"compared with the checkpoint in batches of 1 and {len(images)} {source}: top-1 the "
        f"same, probabilities differ by at most {difference:.1e} (allowed: {export.TOLERANCE:.0e})",
    ]
    return result | {"status": "done", "bytes": num_bytes}, lines, DONE


def register(args: argparse.Namespace) -> Outcome:
    from pipeline.tracking import mlflow_run

    checkpoint = checkpoint_of(args)
    place, run = checkpoint.place, checkpoint.place.parent.parent
    if place.parent.name != "checkpoints":
        raise UserError(f"{place}: lies in no run's folder, which MLflow would be told; name a run")
    cfg = replace(checkpoint.cfg.mlflow, log_model=True, register=args.name)  # which checks the name
    target = mlflow_run.Target.of(cfg, run, checkpoint.meta["training_id"], args.mlflow_uri)
    with redirect_stdout(sys.stderr):  # MLflow tells there where to look at the run
        version = mlflow_run.register(target, place.name, args.name)
    model = f"models:/{args.name}/{version}"
    command = f"mlflow models serve -m {shlex.quote(model)} --env-manager local --port 5001"
    lines = [f"{model} is {place}", f"to serve it: MLFLOW_TRACKING_URI={shlex.quote(target.uri)} {command}"]
    return {"model": model, "version": version, "checkpoint": str(place), "mlflow_uri": target.uri}, lines, DONE
