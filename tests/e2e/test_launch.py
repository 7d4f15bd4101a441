"""Whole commands on a real Ray cluster of this machine, as a new user runs them."""

import json
import os
import pty
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import pytest
from commands import (
    PIPELINE,
    ROOT,
    Start,
    command_line,
    descendants,
    differences,
    kill,
    loss_series,
    state_of,
)
from s3 import s3_storage

from pipeline.storage import Storage

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]  # three attempts in one test, on a busy machine


Command = Callable[..., list[str]]


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all runs of this module go."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def command(digits: Path, storage: Path) -> Command:
    """A training of ResNet-18 on two workers, 60 steps long."""

    def make(name: str, *settings: str) -> list[str]:
        fast = ["model.depth=18", "train.steps=60", "train.global_batch=32", "train.log_every=2", "checkpoint.every=20"]
        quiet = ["mlflow.log_model=false", f"run.storage={storage}", f"run.name={name}"]
        data = [f"data.train={digits}/train", f"data.val={digits}/val"]
        return [PIPELINE, "train", str(ROOT / "configs/digits.yaml"), *data, *fast, *quiet, *settings]

    return make


@pytest.fixture(scope="module")
def undisturbed(command: Command) -> tuple[dict[str, Any], str]:
    """The summary of a training that nothing happens to, with the seconds that it took, and what it said on stderr."""
    began = time.monotonic()
    done = subprocess.run([*command("whole"), "--json"], text=True, capture_output=True, check=False, timeout=150)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout) | {"took": time.monotonic() - began}, done.stderr


def test_train_tells_its_progress_and_its_result(undisturbed: tuple[dict[str, Any], str]) -> None:
    summary, said = undisturbed
    assert (summary["status"], summary["step"], summary["attempts"]) == ("done", 60, 1)
    assert summary["top1"] > 0.5
    assert "2 workers x 1 threads on cpu" in said
    assert re.search(r"step 60/60 .* \d+ images/s  \d:\d\d:\d\d left", said)
    assert Path(summary["checkpoint"]).name == "step_00000060"
    seconds = summary["seconds"]
    for phase in ("start-up", "compute", "data wait", "communication wait", "evaluation", "checkpoint", "shut-down"):
        assert seconds[phase] > 0, phase
    assert sum(seconds.values()) == pytest.approx(summary["took"], rel=0.02, abs=1)  # Python's own end
    assert summary["goodput"] == pytest.approx(seconds["compute"] / sum(seconds.values()), abs=1e-3)
    assert sum(summary["startup"].values()) <= seconds["start-up"] + 0.1
    kept = json.loads((Path(summary["run_dir"]) / "summary.json").read_text())
    assert kept | {"took": summary["took"]} == summary, "for the report"


@pytest.mark.thorough  # the next does so on an object store
def test_stopped_twice_and_resumed_is_bitwise_the_same(
    command: Command, start: Start, storage: Path, undisturbed: tuple[dict[str, Any], str]
) -> None:
    """Ctrl-C as a terminal sends it, SIGTERM as `timeout` does, both to the whole process group; then to the end."""
    training = start(command("parts"))
    training.wait_for("^step ")
    training.signal_group(signal.SIGINT)
    assert training.finish() == 130, training.said
    assert "SIGINT: saving a checkpoint" in training.said
    first = training.wait_for(r"interrupted at step (\d+) of 60")
    assert f"go on with  pipeline train --resume {storage}/parts" in training.said

    training = start(command("parts"))
    training.wait_for(f"attempt 2: step {first.group(1)} of 60, resumed from")
    training.wait_for("^step ")
    training.signal_group(signal.SIGTERM)
    assert training.finish() == 130, training.said
    training.wait_for(r"interrupted at step \d+ of 60")

    training = start([PIPELINE, "train", "--resume", "parts", f"run.storage={storage}"])
    assert training.finish() == 0, training.said
    assert "done at step 60 of 60" in training.said
    assert "Ray does not answer; waiting 20 s for it to end, all else is done" in training.said
    assert f"mlflow ui --port 5000 --backend-store-uri sqlite:///{storage}/mlflow.db" in training.said
    assert differences(state_of(storage / "whole"), state_of(storage / "parts")) == []
    whole, parts = (loss_series(f"sqlite:///{storage}/mlflow.db", run) for run in ("whole", "parts"))
    assert whole == parts
    assert [step for step, _ in whole] == list(range(2, 61, 2))


def test_a_second_ctrl_c_stops_at_once_and_leaves_no_process(command: Command, start: Start) -> None:
    hasty = command("hasty", "train.steps=5000", "train.log_every=1000", "train.global_batch=512")
    training = start(hasty, terminal=True)
    training.wait_for("attempt 1")
    started = descendants(training.process.pid)
    assert any("RayTrainWorker" in command_line(pid) for pid in started)
    (gcs,) = (pid for pid in started if "gcs_server" in command_line(pid))
    assert b"RAY_AUTH_MODE=token" in Path(f"/proc/{gcs}/environ").read_bytes(), "no other user of this machine may join"
    training.signal_group(signal.SIGINT)
    time.sleep(0.3)
    training.signal_group(signal.SIGINT)
    begin = time.monotonic()
    assert training.finish() == 130, training.said
    assert time.monotonic() - begin < 20
    assert [command_line(pid) for pid in started if command_line(pid)] == []


def test_an_error_that_a_restart_would_meet_again_ends_at_once(command: Command, start: Start) -> None:
    training = start([*command("nan", "optim.lr=1e6", "optim.warmup_epochs=0"), "--json"])
    assert training.finish() == 1
    assert re.search(r"the loss of step \d+ is (nan|inf)", json.loads("".join(training.out))["error"])
    assert "".join(training.err).count("attempt") == 1
    assert "Traceback" not in training.said


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("cluster.address=127.0.0.1:9", "cluster.address=127.0.0.1:9 cannot be reached: "),
        ("cluster.device=gpu", "cluster.workers=2: the cluster has 0 GPUs, and each worker takes one"),
        ("train.global_batch=16", "train.global_batch=16: "),  # as tests/runs/test_resume.py has it in detail
    ],
)
def test_what_does_not_fit_the_cluster_or_the_run_is_refused(
    command: Command, start: Start, undisturbed: tuple[dict[str, Any], str], setting: str, message: str
) -> None:
    training = start(command("whole", setting))
    assert training.finish() == 2
    assert message in training.said
    assert "Traceback" not in training.said


def test_a_command_that_is_killed_leaves_no_process(command: Command, start: Start) -> None:
    """The driver saves a checkpoint, and takes Ray's processes with it; its agents would stay for minutes."""
    training = start(command("gone"))
    training.wait_for("^step 20: saved")
    below, deadline = descendants(training.process.pid), time.monotonic() + 60
    kill(training.process.pid)
    while left := [pid for pid in below if command_line(pid)]:
        assert time.monotonic() < deadline, [command_line(pid) for pid in left]
        time.sleep(0.2)


@pytest.mark.parametrize("gap_s", [0.2, *(pytest.param(s, marks=pytest.mark.long) for s in (2, 9))])
@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.long)])
def test_signals_mean_the_same_however_often_they_come(
    command: Command, start: Start, storage: Path, number: signal.Signals, gap_s: float
) -> None:
    """Where a RayJob is deleted, KubeRay stops the Ray job, and then the pod, within seconds. No terminal here."""
    name = f"again_{number.name}_{gap_s}"
    training = start(command(name, "train.steps=5000", "train.log_every=1000", "train.global_batch=512"))
    training.wait_for("attempt 1")
    training.signal_group(signal.SIGTERM)
    deadline = time.monotonic() + gap_s
    while training.process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    while training.process.poll() is None:  # and again, until it has ended
        training.signal_group(number)
        time.sleep(gap_s)
    assert training.finish() == 130, training.said
    step = int(training.wait_for(r"interrupted at step (\d+) of 5000")[1])
    assert f"step_{step:08d}" in Storage(storage / name / "checkpoints").names()
    manifest = json.loads((storage / name / "run.json").read_text())
    assert (manifest["open"], manifest["failures"]) == (False, 0)
    client = mlflow.MlflowClient(f"sqlite:///{storage}/mlflow.db")
    (run,) = client.search_runs(["1"], f"run_name = '{name}'")
    assert run.info.status == "KILLED"


def test_a_stop_is_heard_while_images_do_not_come(
    command: Command, start: Start, digits: Path, storage: Path, tmp_path: Path
) -> None:
    """A mount goes, and the batch system wants its nodes back: the last step that was done is saved."""
    shutil.copytree(digits / "train", tmp_path / "train")
    training = start(command("away", f"data.train={tmp_path}/train"))
    training.wait_for("^step ")
    (tmp_path / "train").rename(tmp_path / "gone")
    training.wait_for("does not answer, trying again for 600 s")
    told = -1
    while told < (now := training.said.count("\nstep ")):  # what was read ahead is trained on
        told = now
        time.sleep(5)
    training.signal_group(signal.SIGTERM)
    assert training.finish() == 130, training.said
    step = int(training.wait_for(r"the next images have not come: ending after step (\d+)")[1])
    assert f"interrupted at step {step} of 60" in training.said
    assert f"go on with  pipeline train --resume {storage}/away" in training.said
    assert "Traceback" not in training.said
    assert "failure" not in training.said
    assert f"step_{step:08d}" in Storage(storage / "away" / "checkpoints").names()
    manifest = json.loads((storage / "away" / "run.json").read_text())
    assert (manifest["open"], manifest["failures"]) == (False, 0)


@pytest.mark.long
def test_the_command_ends_also_where_rays_own_process_stands_still(command: Command, start: Start) -> None:
    """A raylet in SIGSTOP, or on a node in swap: Ray would wait for it without end."""
    training = start(command("still"))
    training.wait_for("^step 20: saved")
    kill(training.find("raylet/raylet")[0], signal.SIGSTOP)
    assert training.finish() == 0, training.said
    assert "done at step 60 of 60" in training.said


@pytest.mark.long
def test_on_s3_killed_stopped_and_resumed_is_the_same(
    command: Command, start: Start, storage: Path, undisturbed: tuple[dict[str, Any], str]
) -> None:
    """Runs in an object store: a worker is killed, the job stopped; it goes on from what the store has."""
    with s3_storage() as s3:
        settings = [f"run.storage={s3}", f"mlflow.uri=sqlite:///{storage}/mlflow.db"]
        training = start(command("cloud", *settings))
        training.wait_for("^step 20: saved s3://bucket/runs/cloud/checkpoints/step_00000020")
        kill(training.find("RayTrainWorker")[0])
        training.wait_for("attempt 2: step .*, resumed from s3://")
        training.signal_group(signal.SIGINT)  # as Ctrl-C in a terminal
        assert training.finish() == 130, training.said
        assert "SIGINT: saving a checkpoint" in training.said
        shutil.rmtree((s3 / "cloud").local_dir)  # the next machine has an empty disk
        shutil.rmtree((s3 / "cloud" / "checkpoints").local_dir)
        training = start([PIPELINE, "train", "--resume", "cloud", f"run.storage={s3}"])
        assert training.finish() == 0, training.said
        training.wait_for(r"attempt 3: step \d+ of 60, resumed from s3://")
        assert list((s3 / "cloud" / "checkpoints").local_dir.iterdir()) == [], "this machine's copies"
        assert differences(state_of(storage / "whole"), state_of(s3 / "cloud")) == []
        place = str(s3 / "cloud")
        scored = subprocess.run([PIPELINE, "evaluate", place, "--json"], capture_output=True, text=True, check=True)
        assert json.loads(scored.stdout)["top1"] == undisturbed[0]["top1"]
    whole, cloud = (loss_series(f"sqlite:///{storage}/mlflow.db", run) for run in ("whole", "cloud"))
    assert cloud == whole


@pytest.mark.long
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
