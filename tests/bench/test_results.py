"""scripts/results.py: what is there is not trained again, what does not fit is refused, and the table's figures."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import results
from commands import ROOT
from results import Case

SCRIPT = str(ROOT / "scripts" / "results.py")
DIGITS = str(ROOT / "configs" / "digits.yaml")


def summary(top1: float, seconds: float = 100.0) -> dict[str, Any]:
    return {"top1": top1, "seconds": {"compute": seconds - 20, "start-up": 20.0}, "images_per_s": 50.0}


def keep(out: Path, name: str, words: list[str], top1: float) -> None:
    (out / f"{name}.json").write_text(json.dumps({"command": words, "commit": "abc", "summary": summary(top1)}))


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SCRIPT, *words], text=True, capture_output=True, check=False, timeout=120)


def test_a_row_has_the_mean_and_the_range_of_its_runs() -> None:
    found = {"fp32": [summary(0.98, 90), summary(0.99, 110), summary(0.995)]}
    *_, row = results.table([Case("fp32", ("train.precision=fp32",))], found)
    assert row == (
        "| fp32 | `train.precision=fp32` | 3 | 0.9883 (0.9800 to 0.9950) | 100 (90 to 110) | 50.0 (50.0 to 50.0) |"
    )


def test_finished_runs_are_not_trained_again(tmp_path: Path) -> None:
    for seed, top1 in ((0, 0.5), (1, 0.7)):
        keep(tmp_path, f"digits-two-words-{seed}", [DIGITS, "train.epochs=1", f"run.seed={seed}"], top1)
    done = run(DIGITS, "train.epochs=1", "--case", "Two words", "--seeds", "0", "1", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "| Two words |  | 2 | 0.6000 (0.5000 to 0.7000) |" in done.stdout


def test_a_run_of_other_settings_is_not_taken_for_this_one(tmp_path: Path) -> None:
    keep(tmp_path, "digits-a-0", [DIGITS, "train.epochs=1", "run.seed=0"], 0.5)
    done = run(DIGITS, "train.epochs=2", "--case", "a", "--seeds", "0", "--out", str(tmp_path))
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.endswith("train.epochs=1 run.seed=0; choose another --out\n")


def test_a_training_that_fails_ends_the_series_and_leaves_no_result(tmp_path: Path) -> None:
    done = run(DIGITS, "--case", "a", "train.epoch=2", "--seeds", "0", "--out", str(tmp_path))
    assert done.returncode == 1
    assert "did you mean train.epochs?" in done.stderr
    assert "digits-a-0: ended with code 2" in done.stderr
    assert list(tmp_path.glob("*.json")) == []


def test_cases_that_would_be_the_same_runs_are_refused(tmp_path: Path) -> None:
    done = run(DIGITS, "--case", "bf 16", "--case", "BF-16", "--out", str(tmp_path))
    assert done.returncode == 2
    assert "two have the same name" in done.stderr
