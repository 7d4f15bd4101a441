"""What people see: links that open, and nothing that ends a training when nobody looks any more."""

import contextlib
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from commands import PIPELINE, ROOT, Run

from pipeline.cli.console import TrainingView, WorkView, format_summary
from pipeline.cluster import supervisor
from pipeline.events import AttemptStarted, CheckpointWritten, Event, RunOpened
from pipeline.failures import Interrupted


@pytest.mark.parametrize("view", [TrainingView, WorkView])
def test_a_reader_that_has_gone_ends_no_training(view: type[TrainingView] | type[WorkView]) -> None:
    """`| tee` that dies, `| head`, an ssh that drops: rich's own console would end the process."""
    read, write = os.pipe()
    os.close(read)
    file = os.fdopen(write, "w")
    with view(file) as shown:
        for _ in range(3):
            shown.print("x" * 100_000)
    with contextlib.suppress(BrokenPipeError):  # of what is left in its buffer
        file.close()


@pytest.mark.parametrize(
    ("uri", "public_url", "shown"),
    [
        ("http://mlflow:5000", None, "http://mlflow:5000/#/experiments/3/runs/abc"),
        ("http://mlflow:5000", "http://localhost:5000/", "http://localhost:5000/#/experiments/3/runs/abc"),
        ("sqlite:////a/mlflow.db", "https://ml.example.com/x", "https://ml.example.com/x/#/experiments/3/runs/abc"),
        ("sqlite:////a/mlflow.db", None, "mlflow ui --port 5000 --backend-store-uri sqlite:////a/mlflow.db"),
    ],
)
def test_the_link_to_a_run_is_one_that_people_can_open(uri: str, public_url: str | None, shown: str) -> None:
    """On a cluster the server's address holds in its pods alone."""
    summary: dict[str, Any] = {"mlflow_uri": uri, "mlflow_public_url": public_url, "mlflow_run_id": "abc"}
    summary |= {"mlflow_experiment_id": "3", "status": "done", "step": 1, "num_steps": 1, "top1": None, "top5": None}
    summary |= {"images_per_s": None, "seconds": {}, "goodput": 1.0, "checkpoint": "/a/x"}
    [line] = [line for line in format_summary(summary) if "look at it" in line]
    assert line.removeprefix("  look at it  ") == shown


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["train", "/none.yaml"], 2, "/none.yaml"),
        (["train", "/none.yaml", "--json"], 2, "/none.yaml"),
        (["nonsense"], 2, "Unknown command"),
        (["config", "configs/digits.yaml"], 0, "global_batch"),
    ],
)
def test_what_nobody_reads_changes_no_exit_code(words: list[str], code: int, text: str, unbuffered: str) -> None:
    env = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    shown = subprocess.run(
        [PIPELINE, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False, text=True, cwd=ROOT, env=env
    )
    assert shown.returncode == code
    assert text in shown.stdout
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([PIPELINE, *words], stdout=write, stderr=write, check=False, cwd=ROOT, env=env)
    os.close(write)
    assert done.returncode == code


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_result_that_cannot_be_written_is_told_in_a_line() -> None:
    with Path("/dev/full").open("wb") as full:
        words = [PIPELINE, "config", "configs/digits.yaml"]
        done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True, check=False, cwd=ROOT)
    assert (done.returncode, done.stderr) == (1, "pipeline: the result cannot be written: No space left on device\n")


def started(step: int, resumed_from: str | None) -> AttemptStarted:
    return AttemptStarted(
        attempt=1,
        step=step,
        num_steps=60,
        global_batch=8,
        resumed_from=resumed_from,
        world_size=1,
        num_threads=1,
        device="cpu",
        precision="fp32",
        precision_reason="asked for",
        startup={},
        failures=0,
        lost_steps=None,
        recovery_s=None,
    )


@pytest.mark.parametrize(
    ("seen", "text"),
    [
        ([], "interrupted"),
        ([RunOpened("a", "/runs/a")], "interrupted"),
        ([RunOpened("a", "/runs/a"), started(0, None)], "interrupted"),
        # A branch: the checkpoint is another run's.
        ([RunOpened("a", "/runs/a"), started(20, "/runs/ab/checkpoints/step_00000020")], "interrupted"),
        (
            [RunOpened("a", "/runs/a"), started(20, "/runs/a/checkpoints/step_00000020")],
            "interrupted; go on from step 20 with: pipeline train --resume /runs/a",
        ),
        (
            [RunOpened("a", "/runs/a"), started(0, None), CheckpointWritten(40, "/runs/a/checkpoints/step_00000040")],
            "interrupted; go on from step 40 with: pipeline train --resume /runs/a",
        ),
    ],
)
def test_an_end_without_a_summary_says_how_to_go_on(
    run: Run, monkeypatch: pytest.MonkeyPatch, seen: list[Event], text: str
) -> None:
    def train(cfg: object, label: str, resume_from: object, emit: TrainingView, *, began: float) -> None:
        for event in seen:
            emit(event)
        raise Interrupted

    monkeypatch.setattr(supervisor, "train", train)
    code, out, _ = run("train", ROOT / "configs" / "digits.yaml")
    assert (code, out.splitlines()[-1]) == (130, text)
