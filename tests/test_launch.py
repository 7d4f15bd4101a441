"""Whole commands on a real Ray cluster of this machine, as a new user runs them."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from test_train import differences

from pipeline import checkpoint

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parent.parent
PIPELINE = str(Path(sys.executable).parent / "pipeline")


@pytest.fixture
def command(digits: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """A training of ResNet-18 on two workers, a few steps long."""

    def make(*settings: str) -> list[str]:
        fast = ["model.depth=18", "train.steps=30", "train.log_every=5", "mlflow.log_model=false"]
        data = [f"data.train={digits}/train", f"data.val={digits}/val", f"run.storage={tmp_path}/runs"]
        return [
            PIPELINE,
            "train",
            str(ROOT / "configs/digits.yaml"),
            *data,
            *fast,
            "mlflow.log_model=false",
            *settings,
        ]

    return make


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[list[str]], "subprocess.Popen[str]"]]:
    """Starts a command in a process group of its own; what still runs of it at the end is killed."""
    started: list[subprocess.Popen[str]] = []

    def popen(command: list[str]) -> "subprocess.Popen[str]":
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        process = subprocess.Popen(command, text=True, cwd=tmp_path, start_new_session=True, **pipes)  # type: ignore[call-overload]
        started.append(process)
        return process  # type: ignore[no-any-return]

    yield popen
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


Start = Callable[[list[str]], "subprocess.Popen[str]"]


def finish(process: "subprocess.Popen[str]") -> tuple[int, str, str]:
    out, err = process.communicate(timeout=150)
    return process.returncode, out, err


def state_of(run_dir: Path) -> dict[str, Any]:
    found = checkpoint.newest_valid(run_dir / "checkpoints", pytest.fail)
    assert found is not None
    return found.state()


def test_train_stop_resume_is_exact_and_one_mlflow_run(
    command: Callable[..., list[str]], start: Start, tmp_path: Path
) -> None:
    """Two workers: 30 steps; and 17, then the same run name to 30. JSON alone on stdout."""
    code, out, err = finish(start([*command("run.name=whole"), "--json"]))
    assert code == 0, err
    whole = json.loads(out)
    assert (whole["status"], whole["step"]) == ("done", 30)
    assert "step 30/30" in err
    assert re.search(r"\d+ images/s  \d:\d\d:\d\d left", err)
    assert "2 workers x 1 threads on cpu" in err

    code, out, err = finish(start([*command("run.name=parts", "run.stop_at_step=17"), "--json"]))
    assert (code, json.loads(out)["step"]) == (0, 17), err
    code, out, err = finish(start(command("run.name=parts")))
    assert code == 0, err
    assert "session 2: step 17 of 30, resumed from" in out
    assert "done at step 30 of 30" in out
    run_id = re.search(r"MLflow run +([0-9a-f]{32})", out)
    assert run_id
    assert f"mlflow ui --port 5000 --backend-store-uri sqlite:///{tmp_path}/runs/mlflow.db" in out
    assert re.search(r"top-1 +0\.\d{4}", out)
    assert differences(state_of(tmp_path / "runs/whole"), state_of(tmp_path / "runs/parts")) == []

    resumed = [
        PIPELINE,
        "train",
        "--resume",
        run_id.group(1),
        f"run.storage={tmp_path}/runs",
        "train.steps=32",
        "--json",
    ]
    code, out, err = finish(start([*resumed, "--json"]))
    assert code == 0, err
    summary = json.loads(out)
    assert (summary["step"], summary["mlflow_run_id"], summary["sessions"]) == (32, run_id.group(1), 3)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_saves_a_checkpoint_and_exits_130(
    command: Callable[..., list[str]], start: Start, tmp_path: Path, name: str
) -> None:
    """As Ctrl-C on a terminal does it, the signal goes to the whole process group."""
    process = start(command("run.name=stopped", "train.steps=5000", "train.log_every=2"))
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step "):
            break
    os.killpg(process.pid, signal.Signals[name])
    code, out, err = finish(process)
    assert code == 130, out + err
    assert f"{name}: saving a checkpoint" in out
    step = re.search(r"interrupted at step (\d+) of 5000", out)
    assert step
    assert f"go on with  pipeline train --resume {tmp_path}/runs/stopped" in out
    assert state_of(tmp_path / "runs/stopped")["step"] == int(step.group(1))


def test_an_error_that_a_restart_would_meet_again_ends_at_once(command: Callable[..., list[str]], start: Start) -> None:
    broken = command("run.name=nan", "optim.lr=1e6", "optim.warmup_epochs=0")
    code, out, err = finish(start([*broken, "--json"]))
    assert code == 1
    assert re.search(r"the loss of step \d+ is (nan|inf)", json.loads(out)["error"])
    assert err.count("session") == 1
    assert "Traceback" not in out + err


def test_a_request_that_does_not_fit_the_cluster_or_run_is_refused(
    command: Callable[..., list[str]], start: Start
) -> None:
    code, _, err = finish(start(command("cluster.device=gpu")))
    assert code == 2
    assert "cluster.workers=2: the cluster has 0 GPUs, and each worker takes one" in err.splitlines()[-1]
    assert finish(start(command("run.name=r", "run.stop_at_step=1")))[0] == 0
    code, _, err = finish(start(command("run.name=r", "train.global_batch=32")))
    assert code == 2
    assert "train.global_batch=32: " in err
    assert "Traceback" not in err


def test_a_killed_worker_is_replaced_and_nothing_changes(
    command: Callable[..., list[str]], start: Start, tmp_path: Path
) -> None:
    settings = ["train.steps=120", "checkpoint.every=20", "train.log_every=2"]
    code, _, err = finish(start([*command("run.name=calm", *settings), "--json"]))
    assert code == 0, err
    process = start(command("run.name=hurt", *settings))
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 20: saved"):
            break
    victims = [pid for pid in descendants(process.pid) if "RayTrainWorker" in command_line(pid)]
    assert len(victims) == 2
    os.kill(victims[1], signal.SIGKILL)
    code, out, err = finish(process)
    assert code == 0, out + err
    assert re.search(r"session 2: step \d+ of 120, resumed from", out)
    assert differences(state_of(tmp_path / "runs/calm"), state_of(tmp_path / "runs/hurt")) == []


def descendants(pid: int) -> list[int]:
    """The processes that `pid` started, and theirs."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:  # it ended meanwhile
            continue
    found, frontier = [], [pid]
    while frontier:
        frontier = [child for child, parent in parents.items() if parent in frontier]
        found += frontier
    return found


def command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def test_a_terminal_shows_a_progress_bar(command: Callable[..., list[str]], tmp_path: Path) -> None:
    master, slave = pty.openpty()
    env = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    process = subprocess.Popen(
        command("run.name=bar", "train.steps=20"), stdout=slave, stderr=slave, cwd=tmp_path, env=env
    )
    os.close(slave)
    shown, deadline = b"", time.monotonic() + 150
    while time.monotonic() < deadline:
        try:
            shown += os.read(master, 65536)
        except OSError:  # the other end is closed
            break
    assert process.wait(30) == 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    assert re.search(r"━+.* 20/20 .*loss \d\.\d+ +\d+ images/s", text)
    assert "top-1" in text
