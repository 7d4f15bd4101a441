"""What a model says of each image of an index, and every figure that follows from it."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.data.stream import FloatArray, IntArray

TOP = 5  # likeliest classes that are kept of each image
ECE_BINS = 15


@dataclass(frozen=True)
class ClassFigures:
    """Of the images of class number `label`, the share that was recognised (recall, the class's accuracy); of those
    taken for it, the share that is right (precision); the class that they were most often taken for, and how often."""

    label: int
    images: int
    recall: float | None
    precision: float | None
    taken_for: tuple[int, int] | None


@dataclass(frozen=True)
class Predictions:
    """Of N images, in the index's order.

    labels: (N,) their classes. best: (N, TOP) the likeliest classes, likeliest first; -1 where there are fewer.
    probabilities: (N, TOP) of these, by softmax. losses: (N,) cross-entropy, nats.
    """

    labels: IntArray
    best: IntArray
    probabilities: FloatArray
    losses: FloatArray

    @property
    def correct(self) -> IntArray:
        """(N,) whether the likeliest class is the image's, 0 or 1."""
        right: IntArray = (self.best[:, 0] == self.labels).astype(np.int64)
        return right

    def scores(self) -> dict[str, float]:
        """{"top1", "top5": shares in 0..1, "loss": nats, "ece": see `calibration_error`, "count": images}"""
        return {
            "top1": float(self.correct.mean()),
            "top5": float((self.best == self.labels[:, None]).any(1).mean()),
            "loss": float(self.losses.mean()),
            "ece": self.calibration_error(),
            "count": len(self.labels),
        }

    def calibration_error(self) -> float:
        """Expected calibration error of the likeliest class (Guo et al. 2017, eq. 3), over ECE_BINS equal bins."""
        confidence, accuracy, counts = self.reliability()
        return float((counts * np.abs(accuracy - confidence)).sum() / counts.sum())

    def reliability(self) -> tuple[FloatArray, FloatArray, IntArray]:
        """(ECE_BINS,) each: mean probability of the likeliest class, share of right ones, images; 0 where none."""
        sure = self.probabilities[:, 0]
        bins = np.minimum((sure * ECE_BINS).astype(np.int64), ECE_BINS - 1)
        counts: IntArray = np.bincount(bins, minlength=ECE_BINS)
        sums = [np.bincount(bins, weights, ECE_BINS) / np.maximum(counts, 1) for weights in (sure, self.correct)]
        return sums[0], sums[1], counts

    def confused(self) -> list[tuple[int, int, int]]:
        """(class, class that it was taken for, images), the most frequent first. Takes no (C, C) table."""
        wrong = self.correct == 0
        pairs, counts = np.unique(np.stack([self.labels, self.best[:, 0]])[:, wrong], axis=1, return_counts=True)
        order = np.argsort(-counts, kind="stable")
        return [(int(a), int(b), int(n)) for a, b, n in zip(*pairs[:, order], counts[order], strict=True)]

    def confident_mistakes(self, number: int) -> IntArray:
        """Up to `number` rows of the index whose likeliest class is wrong, the most probable ones first."""
        wrong = np.flatnonzero(self.correct == 0)
        return wrong[np.argsort(-self.probabilities[wrong, 0], kind="stable")][:number]

    def per_class(self, num_classes: int) -> list[ClassFigures]:
        """Of each class, in their order."""
        images, taken = (np.bincount(of, minlength=num_classes) for of in (self.labels, self.best[:, 0]))
        right = np.bincount(self.labels, self.correct, num_classes)
        commonest = {a: (b, n) for a, b, n in reversed(self.confused())}
        return [
            ClassFigures(
                label=k,
                images=int(images[k]),
                recall=float(right[k] / images[k]) if images[k] else None,
                precision=float(right[k] / taken[k]) if taken[k] else None,
                taken_for=commonest.get(k),
            )
            for k in range(num_classes)
        ]

    def confusion(self, num_classes: int) -> IntArray:
        """(C, C) images of a row's class that were taken for a column's."""
        places = self.labels * num_classes + self.best[:, 0]
        counted: IntArray = np.bincount(places, minlength=num_classes**2)
        return counted.reshape(num_classes, num_classes)

    def save(self, file: Path) -> None:
        np.savez_compressed(file, **vars(self))

    @classmethod
    def load(cls, file: Path) -> "Predictions":
        with np.load(file, allow_pickle=False) as saved:
            return cls(**saved)
