"""The commands that score a trained model and put it to use: evaluate, predict, export, register."""

import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout, suppress
from csv import DictWriter
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from pipeline.cli.common import (
    DONE,
    FAILED,
    WRONG,
    Count,
    Json,
    MlflowUri,
    Outcome,
    Overrides,
    Run,
    RunData,
    Storage,
    checkpoint_of,
    warn,
)
from pipeline.errors import UserError

NUM_COMPARED = 16  # images that an exported model is compared on


def evaluate(
    run: Run,
    /,
    *overrides: Annotated[Overrides, Parameter(help="Settings, such as data.val_size=288.")],
    data: RunData = None,
    tta: Literal["one", "flip", "ten"] = "one",
    storage: Storage = "runs",
    mlflow_uri: MlflowUri = None,
    as_json: Json = False,
) -> Outcome:
    """Exact top-1, top-5 and loss of a run's newest checkpoint, or of a given one.

    Args:
        tta: What is averaged over for each image: itself alone, with its mirror image, or the ten crops of He et al.
    """
    from pipeline.cli.console import format_scores
    from pipeline.training import inference

    place = checkpoint_of(run, storage, mlflow_uri).place
    predictions, _ = inference.evaluate_checkpoint(place, data, warn, views=tta, overrides=list(overrides))
    scores = predictions.scores()
    text = f"{format_scores(scores)}  on {scores['count']} images, tta: {tta}"
    return {"checkpoint": str(place), "tta": tta, **scores}, [str(place), text], DONE


def predict(
    run: Run,
    /,
    *images: Annotated[str, Parameter(name="PATH", allow_leading_hyphen=True)],
    top: Count = 1,
    csv: bool = False,
    storage: Storage = "runs",
    mlflow_uri: MlflowUri = None,
    as_json: Json = False,
) -> Outcome:
    """Class and probability of images, by a run's newest checkpoint or a given one.

    Args:
        images: Image files; folders, whose images at any depth are meant; - for such paths on stdin, one a line.
        top: How many of the likeliest classes to show.
        csv: A table with a header on stdout, a line for each image.
    """
    from pipeline.training import inference

    if csv and as_json:
        raise UserError("--csv: does not go with --json; choose one of them")
    if options := [name for name in images if name.startswith("-") and name != "-"]:
        raise UserError(f"{options[0]}: no such option; a file of this name is ./{options[0]}")
    if not images:
        raise UserError("name an image or a folder of images, such as: pipeline predict pets photo.jpg")
    files = _find_images(images)
    place = checkpoint_of(run, storage, mlflow_uri).place
    predictions: list[dict[str, Any]] = []
    show = predictions.append if as_json else _csv_writer(top) if csv else _print
    code = DONE
    with suppress(BrokenPipeError):  # the reader has had enough, as `head` has
        for prediction in inference.predict(place, files, top, warn):
            if "error" in prediction:
                code = WRONG
                warn(f"{prediction['image']}: {prediction['error']}")
            show(prediction)
    return {"checkpoint": str(place), "predictions": predictions}, [], code


def _find_images(names: Sequence[str]) -> list[Path]:
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
    table = DictWriter(sys.stdout, ["image", "class", "probability", "error", *more], lineterminator="\n")
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


def export(
    run: Run,
    /,
    *,
    format: str,
    out: Path,
    storage: Storage = "runs",
    mlflow_uri: MlflowUri = None,
    as_json: Json = False,
) -> Outcome:
    """Write the model of a run's newest checkpoint, or of a given one, to a file that runs without this package.

    Args:
        format: onnx, or pt2 for torch.export.load.
        out: The file to be written.
    """
    from pipeline.models import export, pretrained
    from pipeline.training import inference

    export.require_writable(format, out)
    place = checkpoint_of(run, storage, mlflow_uri).place
    model, cfg, classes = pretrained.load_model(place)
    notes = export.make_notes(cfg, classes, place.name)
    images, source = inference.some_images(cfg, NUM_COMPARED)
    compared = {"images": len(images), "of": source, "tolerance": export.TOLERANCE}
    result = {"checkpoint": str(place), "out": str(out), "format": format, "compared": compared}
    try:
        difference = export.export(model, notes, images, format, out)
    except export.ExportError as e:
        text = f"{out} is not written: {e}"
        return result | {"status": "failed", "error": text}, [f"failed: {text}"], FAILED
    compared |= {"batches": (1, len(images)), "largest_difference": difference}
    size, num_bytes = notes["size"], out.stat().st_size
    lines = [
        str(place),
        f"{out}: {format}, {num_bytes / 2**20:.1f} MB; "
        f"images uint8 (N, 3, {size}, {size}) -> logits float32 (N, {len(classes)}), N from 1 up",
        f"compared with the checkpoint in batches of 1 and {len(images)} {source}: top-1 the "
        f"same, probabilities differ by at most {difference:.1e} (allowed: {export.TOLERANCE:.0e})",
    ]
    return result | {"status": "done", "bytes": num_bytes}, lines, DONE


def register(
    run: Run,
    name: Annotated[str, Parameter(name="NAME")],
    /,
    *,
    storage: Storage = "runs",
    mlflow_uri: MlflowUri = None,
    as_json: Json = False,
) -> Outcome:
    """Put the model of a run's newest checkpoint, or of a given one, into MLflow's Model Registry, to be served.

    Args:
        name: Of the registered model, of which it becomes a new version.
    """
    from pipeline.runs.spec import CHECKPOINTS
    from pipeline.tracking import mlflow_run
    from pipeline.tracking.mlflow_store import moved_config

    checkpoint = checkpoint_of(run, storage, mlflow_uri)
    place, folder = checkpoint.place, checkpoint.place.parent.parent
    if place.parent.name != CHECKPOINTS:
        raise UserError(f"{place}: lies in no run's folder, which MLflow would be told; name a run")
    tracked = moved_config(checkpoint.cfg.mlflow, checkpoint.cfg.run.storage, folder.parent)
    cfg = replace(tracked, log_model=True, register=name)  # which checks the name
    target = mlflow_run.Target.of(cfg, folder, checkpoint.meta["training_id"], mlflow_uri)
    with redirect_stdout(sys.stderr):  # MLflow tells there where to look at the run
        version = mlflow_run.register(target, place.name, name)
    model = f"models:/{name}/{version}"
    command = f"mlflow models serve -m {shlex.quote(model)} --env-manager local --port 5001"
    lines = [f"{model} is {place}", f"to serve it: MLFLOW_TRACKING_URI={shlex.quote(target.uri)} {command}"]
    return {"model": model, "version": version, "checkpoint": str(place), "mlflow_uri": target.uri}, lines, DONE
