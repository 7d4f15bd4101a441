"""What a model says of each image of an index, and every figure that follows from it."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.data.sampling import FloatArray, IntArray

TOP = 5  # likeliest classes that are kept of each image
ECE_BINS = 15


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
            "count": float(len(self.labels)),
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
