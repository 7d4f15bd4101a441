"""The commands about images: index, pack, preview."""

import shutil
import sys
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from pipeline import machine
from pipeline.cli.common import DONE, SOURCES, Config, Count, CountFrom0, Json, Outcome, Overrides, load, warn
from pipeline.errors import UserError


def index(
    source: Annotated[str, Parameter(help=f"{SOURCES}.")],
    /,
    *,
    out: Path,
    workers: Count | None = None,
    verify: bool = False,
    as_json: Json = False,
) -> Outcome:
    """Index images, and list what cannot be trained on; goes on where it was interrupted.

    Args:
        out: The index file; give it as data.train.
        workers: Processes; by default all cores.
        verify: Decode every image, and leave out what is broken.
    """
    from pipeline.cli.console import WorkView
    from pipeline.data.indexing.build import build_index
    from pipeline.data.indexing.scan import process_pool

    if out.is_dir():
        raise UserError(f"--out {out}: is a folder; name a file, such as {out}/train.arrow")
    parts = out.with_name(f"{out.name}.parts")
    with WorkView(sys.stderr) as view, process_pool(workers or machine.cpu_count()) as pool:
        index, report = build_index(source, pool=pool, parts=parts, progress=view)
    if verify:
        from pipeline.data import verify as decoding

        with WorkView(sys.stderr) as view:
            index, report = decoding.verify(index, report, view)
    index.save(out)
    shutil.rmtree(parts, ignore_errors=True)
    result = _describe(index, report) | {
        "index": str(out),
        "fingerprint": index.fingerprint,
        "verified": verify,
        "parts": {"all": report.units, "there_already": report.reused},
    }
    lines = [f"{out}: {len(index)} images of {len(index.classes)} classes, {len(report.refused)} left out"]
    if report.cmyk:
        lines.append(f"{len(report.cmyk)} CMYK images, which DALI converts to RGB")
    if report.exif_rotated:
        lines.append(f"{len(report.exif_rotated)} images with an EXIF orientation, which DALI applies")
    if report.reused:
        lines.append(f"{report.reused} of {report.units} parts were there already")
    return result, [*lines, f"fingerprint {index.fingerprint}"], DONE


def pack(
    source: Annotated[str, Parameter(help=f"{SOURCES}, or an index.")],
    /,
    *,
    out: Path,
    shard_mb: Count = 256,
    seed: CountFrom0 = 0,
    as_json: Json = False,
) -> Outcome:
    """Pack images into WebDataset tar shards, in a shuffled order; the same bytes each time.

    Args:
        out: The folder of the shards, to be made.
        shard_mb: Size of a shard, in MB.
        seed: Of the order.
    """
    from pipeline.cli.console import WorkView
    from pipeline.data.indexing.build import open_index
    from pipeline.data.pack import pack, require_new

    require_new(out)  # before the images are looked into, which may take long
    with WorkView(sys.stderr) as view:
        index, report = open_index(source, progress=view)
    with WorkView(sys.stderr) as view:
        shards = pack(index, out, shard_mb=shard_mb, seed=seed, progress=view, warn=view.print)
    result = _describe(index, report) | {"out": str(out), "shards": shards}
    text = f"{out}: {len(index)} images of {len(index.classes)} classes in {len(shards)} shards"
    return result, [f"{text}, {len(report.refused)} left out"], DONE


def _describe(index: Any, report: Any) -> dict[str, Any]:
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


def preview(
    config: Config,
    /,
    *overrides: Overrides,
    out: Path,
    step: CountFrom0 = 0,
    images: Count = 64,
    as_json: Json = False,
) -> Outcome:
    """Show the images of a step as the model sees them, with their labels.

    Args:
        config: A YAML file.
        out: The picture, such as grid.png.
        step: Steps done before it.
        images: At most so many.
    """
    from pipeline.data.preview import preview

    shown = preview(load(config, overrides), step, images, out, warn)
    text = f"{out}: {len(shown)} images of step {step}, as they enter the model"
    return {"out": str(out), "step": step, "images": shown}, [text], DONE
