"""Any call to the storage or to MLflow may fail, hang, or be a process's last one: the end is the same."""

import subprocess
import sys

import pytest
from commands import ROOT


@pytest.mark.e2e
@pytest.mark.timeout(720)
@pytest.mark.parametrize("options", [["--sample=32"], ["--s3", "--sample=8"]], ids=["local", "s3"])
def test_one_disturbed_call_changes_nothing(options: list[str]) -> None:
    command = [sys.executable, str(ROOT / "scripts/enumerate_faults.py"), *options, "--seed=0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=700)
    assert done.returncode == 0, done.stdout + done.stderr
