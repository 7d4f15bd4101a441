"""scripts/slurm.sbatch with a played Slurm (support/slurm.py), and the units of systemd for machines without one.

The quick tests play Ray and the training as well: they are about which signal, setting and exit code goes where.
"""

import configparser
import json
import random
import re
import shutil
import signal
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from commands import ROOT, Start, Training, command_line, descendants, kill, loss_series
from slurm import SCRIPT, FakeSlurm, directives

CONFIG = str(ROOT / "configs/digits.yaml")
# For one that was played to be told of SIGTERM, and for the script to come to it.
QUICK = {"        sleep 1\n": "        sleep 0.1\n", "        sleep 5\n": "        sleep 0.1\n"}
TRAINS = 'trap "exit 130" TERM; touch trains; while :; do sleep 0.1; done'
UNITS = ROOT / "scripts" / "systemd"


class Played:
    """A job whose `ray` runs until it is told to end, and whose `pipeline train` is a given script."""

    def __init__(self, slurm: FakeSlurm):
        self.slurm = slurm
        storage = slurm.work / "runs"
        storage.mkdir()
        config = {"run": {"name": None, "storage": str(storage)}}
        (slurm.work / "config.json").write_text(json.dumps(config))
        note = f"{slurm.work}/said"
        slurm.program("ray", f'echo "ray $*" >>{note}; cat "$RAY_AUTH_TOKEN_PATH" >>{note}.token; exec sleep 600')
        self.joining('until [ "$(grep -c . said.token)" -ge "$3" ]; do sleep 0.05; done')
        self.training("exit 0")

    def joining(self, script: str) -> None:
        """What the wait for the nodes is to do."""
        real = shutil.which("python")
        self.slurm.program("python", f'if [ "$1" != - ]; then exec {real} "$@"; fi; {script}')

    def training(self, script: str) -> None:
        play = f'if [ "$1" = config ]; then cat config.json; exit; fi; echo "pipeline $*" >>said; {script}'
        self.slurm.program("pipeline", play)

    def start(self, *settings: str, env: dict[str, str] | None = None) -> Training:
        return self.slurm.submit(CONFIG, *settings, env=env, edits=QUICK)

    def run(self, *settings: str, env: dict[str, str] | None = None) -> int:
        """Its exit code."""
        return self.start(*settings, env=env).finish(60)

    def wait_until_it_trains(self) -> None:
        deadline = time.monotonic() + 60
        while not (self.slurm.work / "trains").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def said(self, command: str) -> list[str]:
        """The command lines of a played command."""
        file = self.slurm.work / "said"
        lines = file.read_text().splitlines() if file.exists() else []
        return [line for line in lines if line.startswith(f"{command} ")]

    @property
    def is_requeued(self) -> bool:
        return any(words[0] == "requeue" for words in self.slurm.calls("scontrol"))


@pytest.fixture
def slurm(tmp_path: Path, start: Start) -> Iterator[FakeSlurm]:
    with FakeSlurm(tmp_path, start, random.SystemRandom().randrange(10**6, 10**7)) as one:
        yield one


@pytest.fixture
def job(slurm: FakeSlurm) -> Played:
    return Played(slurm)


def test_the_script_is_bash_and_has_the_lines_that_the_documentation_shows() -> None:
    subprocess.run(["bash", "-n", SCRIPT], check=True)
    first = SCRIPT.read_text().partition("set -euo pipefail")[0]
    assert first.count("#SBATCH --") == len(directives()), "Slurm reads no further than the first command"
    page = (ROOT / "docs" / "slurm.md").read_text()
    assert re.findall(r"^    (#SBATCH .*)$", page, re.MULTILINE) == re.findall(r"^#SBATCH .*$", first, re.MULTILINE)
    warning_s = int(directives()["signal"].removeprefix("B:TERM@"))
    stop_s = int(re.findall(r"^stop_s=(\d+)", SCRIPT.read_text(), re.MULTILINE)[0])
    assert stop_s + 30 <= warning_s, "Ray's end and the requeue take time, too"
    assert f"{stop_s} seconds" in page


@pytest.mark.parametrize(
    ("args", "env", "message"),
    [
        ([], {}, "no CONFIG, which comes first: sbatch scripts/slurm.sbatch CONFIG run.storage=PLACE"),
        (["--resume", "pets"], {}, "no CONFIG, which comes first"),
        ([CONFIG], {"SLURM_JOB_NODELIST": ""}, "not in a Slurm job; submit it: sbatch scripts/slurm.sbatch CONFIG"),
        ([CONFIG], {"PATH": "/usr/bin:/bin"}, "no `pipeline` here; activate its environment before sbatch"),
        (
            [CONFIG, "run.storage=/no/such"],
            {},
            "run.storage=/no/such: no such folder; make it where all nodes mount it",
        ),
        ([CONFIG, "train.stepz=3"], {}, "train.stepz=3: no such key"),
    ],
)
def test_a_wrong_request_is_refused_in_a_line_before_ray_starts(
    slurm: FakeSlurm, args: list[str], env: dict[str, str], message: str
) -> None:
    slurm.program("ray", "touch started")
    batch = slurm.submit(*args, env=env)
    assert batch.finish(60) == 2
    assert message in batch.said
    assert len(batch.said.strip().splitlines()) == 1
    assert not (slurm.work / "started").exists()
    assert slurm.calls("srun") == []
    assert not (slurm.home / ".ray").exists()


def test_the_job_runs_ray_on_all_nodes_and_trains_on_all_gpus(job: Played) -> None:
    job.slurm.set_nodes(3)
    assert job.run("train.epochs=3", "run.name=pets", env={"SLURM_GPUS_ON_NODE": "4"}) == 0
    head, *others = sorted(job.said("ray"), key=lambda line: "--head" not in line)
    (address,) = re.findall(r"--address=(\S+)", others[0])
    assert len(others) == 2
    assert f"--port={address.partition(':')[2]} " in head
    assert all("--num-gpus=4 " in line and "--num-cpus=1 " in line for line in [head, *others])
    (srun,) = job.slurm.calls("srun")
    assert {"--nodes=2", "--ntasks=2", "--relative=1", "--cpu-bind=none"} <= set(srun)
    (train,) = job.said("pipeline")
    workers = f"cluster.address={address} cluster.workers=12 cluster.device=gpu"
    assert re.search(rf"^pipeline train {CONFIG} run.name=\S+ {workers} train.epochs=3 run.name=pets$", train)
    assert (job.is_requeued, job.slurm.processes()) == (False, [])


def test_one_node_needs_no_step_and_jobs_have_their_own_ports(tmp_path: Path, start: Start) -> None:
    ports = []
    for number in (9000, 9001):
        (tmp_path / str(number)).mkdir()
        with FakeSlurm(tmp_path / str(number), start, number, nodes=1) as slurm:
            job = Played(slurm)
            assert job.run() == 0
            assert slurm.calls("srun") == []
            assert f"run.name=pipeline-{number} " in job.said("pipeline")[0]
            ports += re.findall(r"port=(\d{2,})", job.said("ray")[0])
    assert len(set(ports)) == len(ports) == 6


def test_the_token_is_a_file_of_the_users_alone_and_on_no_command_line(job: Played) -> None:
    job.training(TRAINS)
    batch = job.start()
    job.wait_until_it_trains()
    (file,) = (job.slurm.home / ".ray").iterdir()
    token = file.read_text().strip()
    assert len(token) == 64
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert (job.slurm.work / "said.token").read_text().split() == [token, token], "on both nodes"
    assert not any(token in command_line(pid) for pid in descendants(batch.process.pid))
    assert token not in json.dumps(job.slurm.calls("srun"))
    batch.process.terminate()
    assert batch.finish(60) == 130
    assert token not in batch.said
    assert not file.exists()


@pytest.mark.parametrize(
    ("training", "state", "code", "is_requeued"),
    [
        (TRAINS, "RUNNING", 130, True),
        (TRAINS, "COMPLETING", 130, False),  # by scancel, or a preemption without a grace time
        (TRAINS.replace("130", "1"), "RUNNING", 1, True),  # Ray was gone before it had saved
        (TRAINS.replace("130", "0"), "RUNNING", 0, False),  # it was done just then
        (TRAINS.replace("130", "2"), "RUNNING", 2, False),
        (TRAINS.replace("exit 130", ""), "RUNNING", 137, True),  # killed when its time is over
    ],
    ids=["saved", "saved, while Slurm ends the job", "failed", "done", "refused", "killed"],
)
def test_after_sigterm_what_is_not_done_goes_back_into_the_queue(
    job: Played, training: str, state: str, code: int, is_requeued: bool
) -> None:
    job.training(training)
    job.slurm.set_state(state)
    batch = job.slurm.submit(CONFIG, edits={**QUICK, "stop_s=90": "stop_s=2"})
    job.wait_until_it_trains()
    batch.process.send_signal(signal.SIGTERM)  # to the shell alone
    assert batch.finish(60) == code
    assert job.is_requeued == is_requeued
    assert job.slurm.processes() == []


@pytest.mark.parametrize("code", [0, 1, 2])
def test_what_ends_by_itself_is_not_requeued(job: Played, code: int) -> None:
    job.training(f"exit {code}")
    assert (job.run(), job.is_requeued) == (code, False)


def test_nodes_that_do_not_join_end_the_job(job: Played) -> None:
    job.joining('echo "1 of 2 nodes have joined" >&2; exit 1')
    batch = job.start()
    assert batch.finish(60) == 1
    assert "1 of 2 nodes have joined" in batch.said
    assert (job.said("pipeline"), job.is_requeued, job.slurm.processes()) == ([], False, [])


def test_a_step_that_cannot_start_ends_the_job(job: Played) -> None:
    """Put back into the queue it would fail again, and so without end."""
    job.joining("exec sleep 600")
    job.slurm.program("srun", 'echo "srun: error: Unable to create step" >&2; exit 1')
    batch = job.start()
    assert batch.finish(60) == 1
    assert "srun failed, and would again" in batch.said
    assert (job.said("pipeline"), job.is_requeued, job.slurm.processes()) == ([], False, [])


def test_sigterm_while_nodes_join_requeues(job: Played) -> None:
    job.joining("touch trains; exec sleep 600")
    batch = job.start()
    job.wait_until_it_trains()
    batch.process.send_signal(signal.SIGTERM)
    assert batch.finish(60) == 143
    assert (job.said("pipeline"), job.is_requeued) == ([], True)


def test_a_preemption_that_signals_the_steps_alone_ends_the_training_too(job: Played) -> None:
    job.training(TRAINS)
    batch = job.start()
    job.wait_until_it_trains()
    job.slurm.signal_steps(batch, signal.SIGTERM)
    assert batch.finish(60) == 130
    assert (job.is_requeued, job.slurm.processes()) == (True, [])


def test_ray_that_dies_is_started_again(job: Played) -> None:
    job.training("until [ -e enough ]; do touch trains; sleep 0.1; done")
    batch = job.start()
    job.wait_until_it_trains()
    sleeping = batch.find("sleep 600")
    assert len(sleeping) == 2
    for pid in sleeping:
        kill(pid)
    deadline = time.monotonic() + 30
    while len(job.said("ray")) < 4:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    (job.slurm.work / "enough").touch()
    assert batch.finish(60) == 0
    assert batch.said.count("has ended, and is started again") == 2


@pytest.mark.parametrize(("length", "is_there"), [(32, True), (33, True), (32, False)])
def test_rays_folder_is_in_the_jobs_own_where_the_paths_of_sockets_allow_it(
    job: Played, length: int, is_there: bool
) -> None:
    with tempfile.TemporaryDirectory(prefix="job", dir="/tmp") as short:
        folder = f"{short}/{'x' * (length - len(short) - 1)}"
        make = f"mkdir -p {folder}; " if is_there else ""
        job.slurm.prolog = f"{make}echo export TMPDIR={folder}"
        assert job.run() == 0
    folders = [Path(re.findall(r"--temp-dir=(\S+)", line)[0]) for line in job.said("ray")]
    assert [str(one.parent) for one in folders] == [folder if length == 32 and is_there else "/tmp"] * 2
    assert len(set(folders)) == 2
    assert not any(one.exists() for one in folders)
    of_socket = Path("session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store")
    assert len(str(folders[0] / of_socket)) <= 107


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """As a site's prolog makes it for a job."""
    with tempfile.TemporaryDirectory(prefix="job", dir="/tmp") as folder:
        yield Path(folder)


@pytest.fixture
def submit(slurm: FakeSlurm, digits: Path, short_folder: Path) -> Callable[..., Training]:
    """Start a training of ResNet-18 on tiny images, on two nodes with a core for each."""
    slurm.prolog = f"echo export TMPDIR={short_folder}"
    (slurm.work / "runs").mkdir()
    model = ["model.depth=18", "model.compile=none", "train.precision=fp32", "data.image_size=16", "data.val_resize=16"]
    length = ["train.global_batch=16", "train.log_every=1", "train.eval_every=1000", "checkpoint.every=1000"]
    quiet = ["mlflow.log_model=false", "mlflow.report=false", "mlflow.checkpoints=none", "cluster.workers=2"]
    data = [f"data.train={digits}/train", f"data.val={digits}/val", f"run.storage={slurm.work}/runs"]

    def start(*settings: str, restarts: int = 0) -> Training:
        return slurm.submit(CONFIG, *model, *length, *quiet, *data, *settings, restarts=restarts)

    return start


def assert_nothing_is_left(slurm: FakeSlurm, folder: Path) -> None:
    assert slurm.processes() == []
    assert list(folder.glob("ray.*")) == []
    assert list((slurm.home / ".ray").iterdir()) == []


@pytest.mark.e2e
@pytest.mark.timeout(600)
def test_a_job_that_meets_its_time_limit_resumes_at_the_next_step_and_ends(
    slurm: FakeSlurm, submit: Callable[..., Training], short_folder: Path
) -> None:
    """On two nodes: SIGTERM in mid-training, `scontrol requeue`, and the second start to the end."""
    batch = submit("train.steps=8")
    batch.wait_for_step(2)
    lines = [" ".join(process.cmdline()) for process in slurm.processes()]
    raylets = [line for line in lines if "raylet/raylet" in line]
    assert len(raylets) == 2
    assert all(f"{short_folder}/ray." in line for line in raylets)
    (file,) = (slurm.home / ".ray").iterdir()
    assert not any(file.read_text().strip() in line for line in lines)
    batch.process.send_signal(signal.SIGTERM)
    assert batch.finish() == 130, batch.said
    step = int(batch.wait_for(r"interrupted at step (\d+) of 8")[1])
    assert_nothing_is_left(slurm, short_folder)
    requeues = [["requeue", slurm.job]]
    assert [words for words in slurm.calls("scontrol") if words[0] != "show"] == requeues

    batch = submit("train.steps=8", restarts=1)
    batch.wait_for("start 2 of this job")
    batch.wait_for(f"attempt 2: step {step} of 8, resumed from .*; 2 workers")
    assert batch.finish() == 0, batch.said
    assert "done at step 8 of 8" in batch.said
    assert_nothing_is_left(slurm, short_folder)
    assert [words for words in slurm.calls("scontrol") if words[0] != "show"] == requeues, "no second time"
    series = loss_series(f"sqlite:///{slurm.work}/runs/mlflow.db", f"pipeline-{slurm.job}")
    assert [number for number, _ in series] == list(range(1, 9))


@pytest.mark.chaos
@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_nodes_ray_dies_and_comes_back_and_a_preemption_drains_the_other_nodes(
    slurm: FakeSlurm, submit: Callable[..., Training], short_folder: Path
) -> None:
    batch = submit("train.steps=5000", "checkpoint.every=5")
    batch.wait_for("^step 5: saved")
    (raylet,) = [
        pid for srun in batch.find(" srun ") for pid in descendants(srun) if "raylet/raylet" in command_line(pid)
    ]
    kill(raylet)
    batch.wait_for("^failure: ")
    batch.wait_for("slurm.sbatch: Ray on .* has ended, and is started again")
    again = int(batch.wait_for(r"attempt 2: step (\d+) of .*; 2 workers")[1])
    batch.wait_for_step(again + 2)
    slurm.signal_steps(batch, signal.SIGTERM)
    assert batch.finish() == 130, batch.said
    assert "a node that workers run on is drained" in batch.said
    assert "back into the queue" in batch.said
    assert_nothing_is_left(slurm, short_folder)


@pytest.mark.parametrize("name", ["ray-head", "ray-worker"])
def test_systemd_takes_the_units(name: str, tmp_path: Path) -> None:
    unit = (UNITS / f"{name}.service").read_text()
    parsed = configparser.ConfigParser(strict=False, interpolation=None)
    parsed.read_string(unit)
    service = parsed["Service"]
    assert service["KillMode"] == "mixed", "SIGTERM to all of Ray's processes would leave no time for a checkpoint"
    (drain_s,) = re.findall(r"^Environment=RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=(\d+)$", unit, re.MULTILINE)
    assert int(drain_s) + 20 <= int(service["TimeoutStopSec"])
    assert "RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=/etc/ray/token" in unit
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd is not here")
    here = unit.replace("/opt/pipeline", str(ROOT)).replace("User=ray", "User=root")
    here = here.replace(f"{ROOT}/.venv/bin/ray", str(shutil.which("ray")))
    (tmp_path / f"{name}.service").write_text(here)
    done = subprocess.run(
        ["systemd-analyze", "verify", tmp_path / f"{name}.service"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
