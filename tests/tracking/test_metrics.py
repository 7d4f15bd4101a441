"""Figures of a small table of predictions, worked out by hand."""

from pathlib import Path

import numpy as np
import pytest

from pipeline.tracking.metrics import Predictions

PREDICTIONS = Predictions(
    labels=np.array([0, 0, 1, 2]),
    best=np.array([[0, 1, 2, -1, -1], [1, 0, 2, -1, -1], [1, 2, 0, -1, -1], [0, 1, 2, -1, -1]]),
    probabilities=np.array([[1.0, 0, 0, 0, 0], [0.5, 0.3, 0.2, 0, 0], [0.5, 0.4, 0.1, 0, 0], [0.9, 0.06, 0.04, 0, 0]]),
    losses=np.array([0.0, 1.2, 0.7, 3.2]),
)


def test_scores() -> None:
    scores = PREDICTIONS.scores()
    assert (scores["top1"], scores["top5"], scores["count"]) == (0.5, 1.0, 4)
    assert scores["loss"] == pytest.approx(1.275)
    # Bins of one right at 1.0, two at 0.5 of which one is right, one wrong at 0.9.
    assert scores["ece"] == pytest.approx((0 + 2 * 0 + 0.9) / 4)


def test_confusion_has_a_row_for_each_true_class() -> None:
    assert PREDICTIONS.confusion(3).tolist() == [[1, 1, 0], [0, 1, 0], [1, 0, 0]]


def test_reliability_counts_each_image_once() -> None:
    confidence, accuracy, counts = PREDICTIONS.reliability()
    assert counts.sum() == 4
    assert (confidence[7], accuracy[7], counts[7]) == (0.5, 0.5, 2)
    assert (confidence[14], accuracy[14], counts[14]) == (1.0, 1.0, 1)


def test_they_come_back_from_a_file(tmp_path: Path) -> None:
    PREDICTIONS.save(tmp_path / "p.npz")
    back = Predictions.load(tmp_path / "p.npz")
    assert all(np.array_equal(getattr(back, name), value) for name, value in vars(PREDICTIONS).items())
