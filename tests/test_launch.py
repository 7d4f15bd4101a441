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

import mlflow
import pytest
from test_train import differences

from pipeline import checkpoint
from pipeline.storage import Storage

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]  # three sessions in one test, on a busy machine

ROOT = Path(__file__).parent.parent
PIPELINE = str(Path(sys.executable).parent / "pipeline")


Command = Callable[..., list[str]]
Start = Callable[[list[str]], "subprocess.Popen[str]"]


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all runs of this module go."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def command(digits: Path, storage: Path) -> Command:
    """A training of ResNet-18 on two workers, 60 steps long."""

    def make(name: str, *settings: str) -> list[str]:
        fast = ["model.depth=18", "train.steps=60", "train.log_every=2", "checkpoint.every=20"]
        quiet = ["mlflow.log_model=false", f"run.storage={storage}", f"run.name={name}"]
        data = [f"data.train={digits}/train", f"data.val={digits}/val"]
        return [PIPELINE, "train", str(ROOT / "configs/digits.yaml"), *data, *fast, *quiet, *settings]

    return make


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts a command in a process group of its own; what still runs of it at the end is killed."""
    started: list[subprocess.Popen[str]] = []

    def popen(args: list[str]) -> "subprocess.Popen[str]":
        pipe = subprocess.PIPE
        process = subprocess.Popen(args, text=True, cwd=tmp_path, start_new_session=True, stdout=pipe, stderr=pipe)
        started.append(process)
        return process

    yield popen
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def finish(process: "subprocess.Popen[str]") -> tuple[int, str, str]:
    out, err = process.communicate(timeout=150)
    return process.returncode, out, err


def read_until(process: "subprocess.Popen[str]", beginning: str) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(beginning):
            return
    pytest.fail(f"no line began with {beginning!r}")


def state_of(run_dir: Path) -> dict[str, Any]:
    found = checkpoint.newest_valid(Storage(run_dir / "checkpoints"), pytest.fail)
    assert found is not None
    return found.state()


@pytest.fixture(scope="module")
def undisturbed(command: Command) -> tuple[dict[str, Any], str]:
    """The summary of a training that nothing happens to, and what it said on stderr."""
    done = subprocess.run([*command("whole"), "--json"], text=True, capture_output=True, check=False, timeout=150)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


def test_train_tells_its_progress_and_its_result(undisturbed: tuple[dict[str, Any], str]) -> None:
    summary, said = undisturbed
    assert (summary["status"], summary["step"], summary["sessions"]) == ("done", 60, 1)
    assert summary["top1"] > 0.5
    assert "2 workers x 1 threads on cpu" in said
    assert re.search(r"step 60/60 .* \d+ images/s  \d:\d\d:\d\d left", said)
    assert Path(summary["checkpoint"]).name == "step_00000060"
    assert set(summary["seconds"]) >= {"start-up", "compute", "data wait", "evaluation", "checkpoint", "mlflow"}


def test_stopped_twice_and_resumed_is_bitwise_the_same(
    command: Command, start: Start, storage: Path, undisturbed: tuple[dict[str, Any], str]
) -> None:
    """Ctrl-C as a terminal sends it, SIGTERM as `timeout` does, both to the whole process group; then to the end."""
    process = start(command("parts"))
    read_until(process, "step ")
    os.killpg(process.pid, signal.SIGINT)
    code, out, err = finish(process)
    assert code == 130, out + err
    assert "SIGINT: saving a checkpoint" in out
    first = re.search(r"interrupted at step (\d+) of 60", out)
    assert first
    assert f"go on with  pipeline train --resume {storage}/parts" in out

    process = start(command("parts"))
    read_until(process, f"session 2: step {first.group(1)} of 60, resumed from")
    read_until(process, "step ")
    os.killpg(process.pid, signal.SIGTERM)
    code, out, err = finish(process)
    assert code == 130, out + err
    assert re.search(r"interrupted at step \d+ of 60", out)

    code, out, err = finish(start([PIPELINE, "train", "--resume", "parts", f"run.storage={storage}"]))
    assert code == 0, out + err
    assert "done at step 60 of 60" in out
    run_id = re.search(r"MLflow run +([0-9a-f]{32})", out)
    assert run_id
    assert f"mlflow ui --port 5000 --backend-store-uri sqlite:///{storage}/mlflow.db" in out
    assert differences(state_of(storage / "whole"), state_of(storage / "parts")) == []

    client = mlflow.MlflowClient(f"sqlite:///{storage}/mlflow.db")
    whole, parts = (
        [(m.step, m.value) for m in client.get_metric_history(i, "train/loss")]
        for i in (undisturbed[0]["mlflow_run_id"], run_id.group(1))
    )
    assert whole == parts
    assert [step for step, _ in whole] == list(range(2, 61, 2))


def test_a_killed_worker_is_replaced_and_nothing_changes(
    command: Command, start: Start, storage: Path, undisturbed: tuple[dict[str, Any], str]
) -> None:
    process = start(command("hurt"))
    read_until(process, "step 20: saved")
    victims = [pid for pid in descendants(process.pid) if "RayTrainWorker" in command_line(pid)]
    assert len(victims) == 2
    os.kill(victims[1], signal.SIGKILL)
    code, out, err = finish(process)
    assert code == 0, out + err
    assert re.search(r"fault: .*worker 1 failed: .*died", out), out
    assert re.search(r"session 2: step \d+ of 60, resumed from", out)
    assert differences(state_of(storage / "whole"), state_of(storage / "hurt")) == []


def test_a_second_signal_stops_at_once_and_leaves_no_process(command: Command, start: Start) -> None:
    process = start(command("hasty", "train.steps=5000", "train.log_every=1000"))
    read_until(process, "session 1")
    started = descendants(process.pid)
    assert any("RayTrainWorker" in command_line(pid) for pid in started)
    os.killpg(process.pid, signal.SIGINT)
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGINT)
    begin = time.monotonic()
    code, out, err = finish(process)
    assert code == 130, out + err
    assert time.monotonic() - begin < 20
    assert [command_line(pid) for pid in started if command_line(pid)] == []


def test_an_error_that_a_restart_would_meet_again_ends_at_once(command: Command, start: Start) -> None:
    code, out, err = finish(start([*command("nan", "optim.lr=1e6", "optim.warmup_epochs=0"), "--json"]))
    assert code == 1
    assert re.search(r"the loss of step \d+ is (nan|inf)", json.loads(out)["error"])
    assert err.count("session") == 1
    assert "Traceback" not in out + err


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("cluster.device=gpu", "cluster.workers=2: the cluster has 0 GPUs, and each worker takes one"),
        ("train.global_batch=32", "train.global_batch=32: "),  # found out by the workers
    ],
)
def test_what_does_not_fit_the_cluster_or_the_run_is_refused(
    command: Command, start: Start, undisturbed: tuple[dict[str, Any], str], setting: str, message: str
) -> None:
    code, _, err = finish(start(command("whole", setting)))
    assert code == 2
    assert message in err
    assert "Traceback" not in err


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


def test_a_terminal_shows_a_progress_bar(command: Command, tmp_path: Path) -> None:
    master, slave = pty.openpty()
    env = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    process = subprocess.Popen(command("bar", "train.steps=20"), stdout=slave, stderr=slave, cwd=tmp_path, env=env)
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
