"""What a training came to, as files for people: one HTML page that needs nothing else, and its figures.

`Facts` is all that it takes besides MLflow's curves. It can be laid aside in a folder, so that a report can be made
after its training has ended, elsewhere, with no model and no images.
"""

import base64
import io
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline.config.loading import changed_keys, dump, load, marked
from pipeline.config.schema import Config
from pipeline.data.loading.loader import EvalLoader
from pipeline.text import figure
from pipeline.tracking.ledger import goodput, summed_up
from pipeline.tracking.metrics import ClassFigures, Predictions
from pipeline.tracking.report import charts
from pipeline.tracking.report.charts import History

NUM_MISTAKES = 24  # pictures
MAX_CLASSES = 50  # in the table; of more the worst and the best
MAX_MATRIX = 20  # classes whose confusion matrix is a table
MAX_PAIRS = 12  # most confused classes
PAGE, TEMPLATE = "report.html", "report.html.j2"
FACTS, CONFIG, PREDICTIONS = "facts.json", "config.yaml", "predictions.npz"


@dataclass(frozen=True)
class Mistake:
    """An image that was taken for another class: its row of the index, its place, and what the model saw."""

    row: int
    place: str
    jpeg: bytes


@dataclass(frozen=True)
class Facts:
    """run: its name. data: the images that `predictions` are of. meta: of the checkpoint that made them, see
    `checkpoint`; and "counted": until when its "seconds" are, if that is not its step.
    """

    run: str
    data: str
    meta: dict[str, Any]
    cfg: Config
    predictions: Predictions
    mistakes: list[Mistake]

    def save(self, folder: Path) -> None:
        """Lay the facts aside as files of an empty folder."""
        mistakes = [{"row": mistake.row, "place": mistake.place} for mistake in self.mistakes]
        content = {"run": self.run, "data": self.data, "meta": self.meta, "mistakes": mistakes}
        (folder / FACTS).write_text(json.dumps(content), encoding="utf-8")
        (folder / CONFIG).write_text(dump(self.cfg), encoding="utf-8")
        self.predictions.save(folder / PREDICTIONS)
        for mistake in self.mistakes:
            (folder / f"{mistake.row}.jpg").write_bytes(mistake.jpeg)

    @classmethod
    def load(cls, folder: Path) -> "Facts":
        content = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        mistakes = [Mistake(**m, jpeg=(folder / f"{m['row']}.jpg").read_bytes()) for m in content["mistakes"]]
        predictions = Predictions.load(folder / PREDICTIONS)
        return cls(content["run"], content["data"], content["meta"], load(folder / CONFIG), predictions, mistakes)

    @property
    def classes(self) -> list[str]:
        return list(self.meta["classes"])

    def headline(self) -> dict[str, Any]:
        """The figures that come first; None for what an earlier version's checkpoint does not tell.

        {"top1", "top5", "loss", "ece", "count": see `Predictions.scores`, "step", "num_steps", "best_top1": of the
         training's evaluations, "images_per_s": of its last attempt, "goodput", "seconds": per phase, "counted": up to
         when, in words, "attempts", "failures"}
        """
        meta, names = self.meta, ("step", "num_steps", "best_top1", "images_per_s", "attempts", "failures")
        seconds = meta.get("seconds") or {}
        return {
            **self.predictions.scores(),
            **{name: meta.get(name) for name in names},
            "counted": meta.get("counted", f"until step {meta['step']:,}"),
            "goodput": goodput(seconds) if seconds else None,
            "seconds": summed_up(seconds),
        }

    def worst_first(self) -> list[ClassFigures]:
        """Each class; those without images last."""
        figures = self.predictions.per_class(len(self.classes))
        return sorted(figures, key=lambda c: (c.recall is None, c.recall, -c.images))


def find_mistakes(predictions: Predictions, loader: EvalLoader) -> list[Mistake]:
    """The most confident ones, with their pictures from the loader of the same index."""
    rows = predictions.confident_mistakes(NUM_MISTAKES)
    if not len(rows):
        return []
    images = loader.pictures(rows).permute(0, 2, 3, 1).numpy()
    return [
        Mistake(int(row), loader.index.full_path(int(row)), _jpeg(pixels))
        for row, pixels in zip(rows, images, strict=True)
    ]


def _jpeg(pixels: np.ndarray[Any, Any]) -> bytes:
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "JPEG", quality=92, subsampling=0)
    return content.getvalue()


def write_report(facts: Facts, history: History, out: Path, note: str = "") -> list[str]:
    """Write report.html and its figures into the folder `out`, which is made.

    Args:
        history: of `charts.METRICS`.
        note: why there is none, or not all of it.

    Returns:
        The names of the files.
    """
    out.mkdir(parents=True, exist_ok=True)
    head, figures = facts.headline(), []
    if history:
        charts.curves(history, out / "curves.png")
        figures.append("curves.png")
    charts.ledger(head["seconds"], out / "time.png")
    charts.reliability(facts.predictions, out / "reliability.png")
    charts.confusion(facts.predictions, facts.classes, out / "confusion.png")
    figures += ["time.png", "reliability.png", "confusion.png"]
    images = {name.removesuffix(".png"): _uri("png", (out / name).read_bytes()) for name in figures}
    (out / PAGE).write_text(_page(facts, head, images, note), encoding="utf-8")
    return [PAGE, *figures]


def _page(facts: Facts, head: dict[str, Any], images: dict[str, str], note: str) -> str:
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"share": _share, "figure": figure, "span": _span}
    template = environment.from_string(Path(__file__).with_name(TEMPLATE).read_text(encoding="utf-8"))
    ranked = facts.worst_first()
    num_classes, half = len(ranked), MAX_CLASSES // 2
    changed = changed_keys(facts.cfg)
    return template.render(
        facts=facts,
        cfg=facts.cfg,
        head=head,
        total_s=sum(head["seconds"].values()),
        images=images,
        note=note,
        classes=facts.classes,
        tables=[ranked] if num_classes <= MAX_CLASSES else [ranked[:half], ranked[-half:]],
        matrix=facts.predictions.confusion(num_classes).tolist() if num_classes <= MAX_MATRIX else None,
        pairs=facts.predictions.confused()[:MAX_PAIRS],
        labels_images=np.bincount(facts.predictions.labels, minlength=num_classes).tolist(),
        mistakes=list(_mistakes_to_show(facts)),
        num_wrong=int((facts.predictions.correct == 0).sum()),
        config=list(marked(dump(facts.cfg), changed)),
        num_changed=len(changed),
        environment=_environment(facts),
        made=_date(time.time()),
    )


def _mistakes_to_show(facts: Facts) -> Iterator[dict[str, Any]]:
    predictions, classes = facts.predictions, facts.classes
    for mistake in facts.mistakes:
        yield {
            "place": mistake.place,
            "picture": _uri("jpeg", mistake.jpeg),
            "true": classes[predictions.labels[mistake.row]],
            "taken": classes[predictions.best[mistake.row, 0]],
            "probability": float(predictions.probabilities[mistake.row, 0]),
        }


def _environment(facts: Facts) -> dict[str, Any]:
    meta = facts.meta
    rows = {
        "checkpoint of": _date(meta["time"]) if "time" in meta else None,
        "device": meta.get("device"),
        "workers": meta.get("workers"),
        "git commit": meta.get("git_commit"),
        **meta.get("versions", {}),
        "training images": facts.cfg.data.train,
        "their fingerprint": meta.get("fingerprint"),
        "evaluated images": facts.data,
        "training id": meta.get("training_id"),
        "MLflow run": meta.get("mlflow_run_id"),
        "to go on": f"pipeline train --resume {facts.run}",
    }
    return {name: value for name, value in rows.items() if value is not None}


def _uri(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _date(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))


def _share(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{100 * value:.{digits}f}%"


def _span(seconds: float) -> str:
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours:,} h {m:02d} min" if hours else f"{m} min {s:02d} s" if m else f"{seconds:.1f} s"
