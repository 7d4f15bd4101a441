"""Any call to the storage or to MLflow may fail, hang, or be a process's last one: the end is the same."""

import subprocess
import sys

import pytest
from commands import ROOT


@pytest.mark.e2e
@pytest.mark.timeout(720)
@pytest.mark.parametrize(
    "options",
    [
        pytest.param(["--sample=12"], id="local"),
        pytest.param(["--s3", "--sample=4"], id="s3", marks=pytest.mark.long),
    ],
)
def test_one_disturbed_call_changes_nothing(options: list[str]) -> None:
    command = [sys.executable, str(ROOT / "scripts/enumerate_faults.py"), *options, "--seed=0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=700)
    assert done.returncode == 0, done.stdout + done.stderr


FORGETS = """
import sys, tempfile
from pathlib import Path
sys.path[:0] = sys.argv[1:]
import fault_slot
from pipeline.runs import checkpoint
with tempfile.TemporaryDirectory() as folder:
    fault_slot.prepare(Path(folder))
    slot = fault_slot.Slot(Path(folder), 0, None)
    slot.reset(0)
    print(slot.command(0, None).kind)
    checkpoint.newest_valid = lambda *_, **__: None
    print(slot.command(1, None).kind)
"""


@pytest.mark.e2e
def test_the_enumeration_sees_a_training_that_forgets() -> None:
    """That begins before a checkpoint of which the user was told."""
    command = [sys.executable, "-c", FORGETS, str(ROOT / "scripts"), str(ROOT / "tests/support")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150, check=False)
    assert done.stdout.split() == ["done", "forgets"], done.stdout + done.stderr
