"""`pipeline bench loader --host`: it measures what it says, on any machine."""

from pathlib import Path
from statistics import median

import pytest

from pipeline.bench import host
from pipeline.config.loading import load


def test_cost_and_kept_speed_are_measured_and_told(digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "TURN_S", 0.2)
    data = [f"data.{split}={digits}/{split}" for split in ("train", "val")]
    settings = ["train.global_batch=64", "cluster.workers=1", "data.mixup=0.2", "data.erase=0.5"]
    result = host.bench_host(load(None, [*data, *settings]), 2, 128, lambda *_: None)
    assert 0 < result["thread_ms"] <= result["process_ms"], "the launching thread's is a part of the process's"
    assert result["images_per_s"] > 0
    assert result["kept"] > 0
    lines = "\n".join(host.format_result(result))
    assert "for 256 images" in lines
    assert f"{result['process_ms'] * 4:.2f}" in lines, "a batch of 64 is a quarter"


def test_work_beside_takes_from_the_small_works_speed() -> None:
    """What holds the interpreter lock all the time leaves about half of it: the measurement can fail."""

    def hold(stop: object) -> None:
        while not stop.is_set():  # type: ignore[attr-defined]
            sum(range(1000))

    pairs = [(host._small_work(0.3), host._small_work(0.3, hold)) for _ in range(7)]  # others may slow down some
    assert median(beside / alone for alone, beside in pairs) < 0.8
