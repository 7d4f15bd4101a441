"""scripts/follow_rayjob.sh before a `kubectl` that answers from files, which change as a RayJob's objects do."""

import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import ROOT, Start, Training

KUBECTL = """#!/bin/sh
cd {folder}
case "$*" in
*" logs --follow "*) for pod; do :; done; cat "log-$pod" ;;
*" get rayjob digits --output=name"*) [ -f rayjob ] && echo rayjob.ray.io/digits ;;
*" get rayjob digits "*) cat rayjob ;;
*" get pods --selector="*) cat submitters ;;
*" get pods "*) cat pods ;;
*) echo "$*" >&2; exit 1 ;;
esac
"""


@pytest.fixture
def cluster(tmp_path: Path) -> Path:
    """What kubectl answers from; nothing is there yet."""
    (tmp_path / "cluster").mkdir()
    script = tmp_path / "kubectl"
    script.write_text(KUBECTL.format(folder=tmp_path / "cluster"))
    script.chmod(0o755)
    (tmp_path / "cluster" / "submitters").touch()
    (tmp_path / "cluster" / "pods").touch()
    return tmp_path / "cluster"


@pytest.fixture
def follow(cluster: Path, start: Start) -> Callable[[], Training]:
    command = ["bash", str(ROOT / "scripts/follow_rayjob.sh"), "pipeline-demo", "digits"]
    return lambda: start(command, {"PATH": f"{cluster.parent}:{os.environ['PATH']}"})


def test_from_the_first_second_through_a_retry_to_the_end(cluster: Path, follow: Callable[[], Training]) -> None:
    script = follow()
    script.wait_for(re.escape("there is no RayJob of this name in the namespace pipeline-demo yet"))
    (cluster / "pods").write_text(
        "digits-abc-head Pending 0/1 nodes are available: 1 Insufficient cpu.\nother-x Pending\n"
    )
    (cluster / "rayjob").write_text("Initializing  ")
    script.wait_for(re.escape("Initializing digits-abc-head Pending 0/1 nodes are available: 1 Insufficient cpu."))
    (cluster / "log-digits-1").write_text("step 1/3\n")
    (cluster / "pods").write_text("")
    (cluster / "submitters").write_text("digits-1\n")
    (cluster / "rayjob").write_text("Running RUNNING ")
    script.wait_for(re.escape("step 1/3"))
    (cluster / "submitters").write_text("")
    (cluster / "rayjob").write_text("Retrying FAILED AppFailed")
    script.wait_for(re.escape("Retrying, FAILED"))
    (cluster / "log-digits-2").write_text("step 3/3\n")
    (cluster / "submitters").write_text("digits-2\n")
    (cluster / "rayjob").write_text("Running RUNNING ")
    script.wait_for(re.escape("step 3/3"))
    (cluster / "rayjob").write_text("Complete SUCCEEDED ")
    assert script.finish() == 0
    assert script.out == ["step 1/3\n", "step 3/3\n"]


@pytest.mark.parametrize(
    ("status", "told"),
    [
        ("Complete STOPPED ", "digits: STOPPED"),
        (
            "Failed  PreRunningDeadlineExceeded",
            "digits: failed: PreRunningDeadlineExceeded; what it lacked: pipeline doctor",
        ),
        ("Failed FAILED AppFailed", "digits: failed: AppFailed"),
    ],
)
def test_another_end_than_success_is_told(
    cluster: Path, follow: Callable[[], Training], status: str, told: str
) -> None:
    (cluster / "rayjob").write_text(status)
    script = follow()
    assert script.finish() == 1
    script.wait_for(re.escape(told))


def test_it_says_how_to_call_it() -> None:
    done = subprocess.run(
        ["bash", str(ROOT / "scripts/follow_rayjob.sh"), "digits"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert re.fullmatch(r"usage: scripts/follow_rayjob.sh NAMESPACE RAYJOB, such as: .*\n", done.stderr)
