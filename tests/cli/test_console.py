"""What people see ends nothing when nobody looks any more."""

import contextlib
import os
import subprocess
from pathlib import Path

import pytest
from commands import PIPELINE, ROOT

from pipeline.cli.console import TrainingView, WorkView


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
