"""A page of pictures: what the model really sees in a step, with its labels."""

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from pipeline.config.schema import Config
from pipeline.data.index import Index
from pipeline.data.indexing.build import open_index
from pipeline.data.loading.bad_images import BadDataError
from pipeline.data.loading.loader import Batch, LoaderContext, TrainLoader
from pipeline.errors import UserError
from pipeline.events import BrokenImage

MIN_CELL = 96  # pixels; smaller images are enlarged by a whole factor
MARGIN, LINE = 6, 14
MIN_SHARE = 0.005  # of a class, to be named under a picture


def preview(cfg: Config, step: int, num_images: int, out: Path, warn: Callable[[str], None]) -> list[dict[str, Any]]:
    """Write the first images of a global batch, as they enter the model, to a picture.

    Args:
        step: steps done before the one that is shown.
        out: the picture, its format by its suffix.
        warn: told of broken images, whose place uniform ones take.

    Returns:
        For each image {"row", "image": its path, "labels": {class: share}}.

    Raises:
        UserError: no such data, or a picture that cannot be written.
    """
    if out.suffix.lower() not in Image.registered_extensions():
        raise UserError(f"--out {out}: no picture format has the suffix {out.suffix!r}; name it .png or .jpg")
    index, _ = open_index(cfg.data.train)

    def on_bad(path: str, reason: str) -> None:
        warn(BrokenImage(path, reason).text)

    with closing(
        TrainLoader(
            index, cfg.data, LoaderContext.here(), on_bad, global_batch=cfg.train.global_batch, seed=cfg.run.seed
        )
    ) as loader:
        try:
            (batch,) = loader.from_step(step, step + 1)
        except BadDataError as e:
            raise UserError(str(e)) from None
    labels = _labels(batch, index)[:num_images]
    try:
        _draw(batch, labels).save(out)
    except OSError as e:
        raise UserError(f"--out {out}: cannot be written ({e.strerror or e}); name another file") from None
    return [
        {"row": int(row), "image": index.full_path(int(row)), "labels": shares}
        for row, shares in zip(batch.rows, labels, strict=False)
    ]


def _labels(batch: Batch, index: Index) -> list[dict[str, float]]:
    """For each image its classes with their shares, the largest first."""
    if batch.labels.ndim == 1:
        return [{index.classes[label]: 1.0} for label in batch.labels.tolist()]
    top = batch.labels.topk(min(2, len(index.classes)))
    return [
        {index.classes[k]: share for k, share in zip(classes, shares, strict=True) if share > 0}
        for shares, classes in zip(top.values.tolist(), top.indices.tolist(), strict=True)
    ]


def _draw(batch: Batch, labels: list[dict[str, float]]) -> Image.Image:
    images = batch.images.permute(0, 2, 3, 1).cpu().numpy()
    size = images.shape[1]
    cell = size * max(1, -(-MIN_CELL // size))
    columns = max(1, round(len(labels) ** 0.5))
    width, height = cell + MARGIN, cell + MARGIN + 2 * LINE
    page = Image.new("RGB", (columns * width + MARGIN, -(-len(labels) // columns) * height + MARGIN), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(size=LINE - 3)
    for i, (pixels, shares) in enumerate(zip(images, labels, strict=False)):
        x, y = MARGIN + i % columns * width, MARGIN + i // columns * height
        page.paste(Image.fromarray(pixels).resize((cell, cell), Image.Resampling.NEAREST), (x, y))
        visible = {name: share for name, share in shares.items() if share >= MIN_SHARE}
        for line, (name, share) in enumerate(visible.items()):
            text = name if len(visible) == 1 else f"{share:.2f} {name}"
            while font.getlength(text) > cell:
                text = text[:-2] + "…"
            draw.text((x, y + cell + line * LINE), text, fill="black", font=font)
    return page
