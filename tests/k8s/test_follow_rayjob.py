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
echo "$*" >>calls
case "$*" in
*" logs --follow "*) for pod; do :; done; cat "log-$pod" ;;
*" get rayjob digits --ignore-not-found "*)
    if [ -f refusal ]; then
        echo 'E1201 12:00:00 memcache.go:265] "Unhandled Error"' >&2
        cat refusal >&2
        exit 1
    fi
    echo "Warning: a plugin that logs in" >&2
    [ ! -f rayjob ] || cat rayjob ;;
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
    (cluster / "refusal").write_text("error: You must be logged in to the server")
    script.wait_for("digits: error: error: You must be logged in")
    (cluster / "refusal").unlink()
    (cluster / "pods").write_text("other-x 0/1 Pending 0 1s\ndigits-abc-head 0/1 ImagePullBackOff 0 1s\n")
    (cluster / "rayjob").write_text("is Initializing  ")
    script.wait_for("digits: Initializing digits-abc-head ImagePullBackOff")
    (cluster / "log-digits-1").write_text("step 1/3\n")
    (cluster / "pods").write_text("digits-abc-head 1/1 Running 0 1m\n")
    (cluster / "submitters").write_text("digits-1 Succeeded\n")
    (cluster / "rayjob").write_text("is Running RUNNING ")
    script.wait_for("step 1/3")
    (cluster / "submitters").write_text("")
    (cluster / "rayjob").write_text("is Retrying FAILED AppFailed")
    script.wait_for("digits: Retrying FAILED AppFailed")
    (cluster / "log-digits-2").write_text("step 3/3\n")
    (cluster / "submitters").write_text("digits-2 Succeeded\n")
    (cluster / "rayjob").write_text("is Running RUNNING ")
    script.wait_for("step 3/3")
    (cluster / "rayjob").write_text("is Complete SUCCEEDED ")
    assert script.finish() == 0
    assert script.out == ["step 1/3\n", "step 3/3\n"]


def test_a_stream_that_breaks_is_taken_up_again(cluster: Path, follow: Callable[[], Training]) -> None:
    """From where it was; and a RayJob that somebody deletes is told."""
    (cluster / "rayjob").write_text("is Running RUNNING ")
    (cluster / "submitters").write_text("digits-1 Running\n")
    (cluster / "log-digits-1").write_text("step 1/3\n")
    script = follow()
    script.wait_for("step 1/3\nstep 1/3")
    (cluster / "submitters").write_text("")
    (cluster / "rayjob").unlink()
    assert script.finish() == 1
    script.wait_for("digits: is deleted")
    assert "logs --follow --since=5s digits-1" in (cluster / "calls").read_text()


@pytest.mark.parametrize(
    ("status", "told"),
    [
        (
            "is Complete STOPPED ",
            "digits: Complete STOPPED; to start it again: kubectl --namespace pipeline-demo delete rayjob",
        ),
        (
            "is Failed  PreRunningDeadlineExceeded",
            "digits: Failed PreRunningDeadlineExceeded; the log says why, or: pipeline doctor",
        ),
        ("is Failed FAILED AppFailed", "digits: Failed FAILED AppFailed"),
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
