"""Decoding a whole index with the training's own decoder, to find what only decoding shows."""

import dataclasses
from contextlib import closing

import numpy as np

from pipeline.config.data import DataConfig
from pipeline.data.batch_spec import WholeImageSpecs
from pipeline.data.index import Index
from pipeline.data.indexing.build import IndexReport, Progress, SkippedInput, drop_rows
from pipeline.data.loading.loader import EvalLoader, LoaderContext
from pipeline.errors import UserError

BATCH = 128


def verify(index: Index, report: IndexReport, progress: Progress) -> tuple[Index, IndexReport]:
    """The index without the images that cannot be decoded, and the report with them.

    Args:
        progress: called with (images done, images in all, words).

    Raises:
        UserError: none can be decoded.
    """
    reasons: dict[str, str] = {}
    cfg = DataConfig(image_size=32, val_resize=32, max_bad_fraction=1.0)
    done = 0
    specs = WholeImageSpecs(cfg)
    with closing(EvalLoader(index, cfg, LoaderContext.here(), reasons.__setitem__, batch=BATCH, specs=specs)) as loader:
        for _, batch in loader:
            done += len(batch.rows)
            progress(done, len(index), f"images decoded, {len(reasons)} broken")
    if not reasons:
        return index, report
    broken = [row for row in range(len(index)) if index.full_path(row) in reasons]
    if len(broken) == len(index):
        raise UserError(
            f"{index} has no image that can be decoded; the first: {': '.join(next(iter(reasons.items())))}"
        )

    def renumbered(rows: list[int]) -> list[int]:
        kept = np.setdiff1d(rows, broken)
        return [int(row) for row in kept - np.searchsorted(broken, kept)]

    skipped = [SkippedInput(path, f"cannot be decoded: {reason}") for path, reason in sorted(reasons.items())]
    cmyk, exif_rotated = renumbered(report.cmyk), renumbered(report.exif_rotated)
    return drop_rows(index, broken), dataclasses.replace(
        report, refused=report.refused + skipped, cmyk=cmyk, exif_rotated=exif_rotated
    )
