"""Processes of a training are killed at random moments, by seed: the result is the undisturbed one's, to the bit.

Each run has two workers, and at its end the same weights, averages and momentum, and in MLflow the same series of
(step, loss), each step once. `pytest -m chaos -rP` shows what each cost.
"""

import random
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import PIPELINE, ROOT, Start, Training, differences, history, kill, loss_series, state_of
from nodes import AUTHENTICATION, Cluster, cluster
from s3 import free_port
from servers import MlflowServer

from pipeline.tracking.ledger import PHASES

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(400)]

NUM_STEPS = 40


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    """A real MLflow server, for all runs."""
    with MlflowServer(tmp_path_factory.mktemp("mlflow"), free_port()) as one:
        one.start()
        yield one


Command = Callable[..., list[str]]


@pytest.fixture(scope="module")
def command(digits: Path, storage: Path, server: MlflowServer) -> Command:
    def make(name: str, *settings: str) -> list[str]:
        model = ["model.depth=18", "train.ema_decay=0.99", "train.global_batch=32", "cluster.workers=2"]
        often = [f"train.steps={NUM_STEPS}", "train.log_every=1", "train.eval_every=4", "checkpoint.every=10"]
        quiet = ["cluster.timeout_s=60", "mlflow.log_model=false", f"mlflow.uri={server.uri}"]
        quiet += [f"run.storage={storage}", f"run.name={name}"]
        data = [f"data.train={digits}/train", f"data.val={digits}/val"]
        return [PIPELINE, "train", str(ROOT / "configs/digits.yaml"), *data, *model, *often, *quiet, *settings]

    return make


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[Cluster]:
    """A Ray cluster of three nodes on this machine: a head, and two with room for a worker each."""
    with cluster(free_port()) as one:
        one.add()
        one.add()
        yield one


@pytest.fixture(scope="module")
def undisturbed(command: Command, storage: Path, server: MlflowServer) -> tuple[dict[str, Any], list[Any]]:
    """The final state of a training that nothing happens to, and its losses."""
    done = subprocess.run(command("whole"), capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    series = loss_series(server.uri, "whole")
    assert [step for step, _ in series] == list(range(1, NUM_STEPS + 1))
    return state_of(storage / "whole"), series


class Run:
    """One training to be hurt, and what the harm is to find."""

    def __init__(self, name: str, command: Command, start: Start, rng: random.Random):
        self.name, self._command, self._start, self.rng = name, command, start, rng
        self.env: dict[str, str] = {}
        self.settings: list[str] = []
        self.training = Training.__new__(Training)
        self.codes: list[int] = []

    def begin(self) -> None:
        self.training = self._start(self._command(self.name, *self.settings), self.env)

    def reach_a_random_moment(self) -> None:
        self.training.wait_for_step(self.rng.randrange(5, NUM_STEPS - 25))
        time.sleep(self.rng.random() * 0.5)

    def kill_one(self, pattern: str) -> None:
        kill(self.rng.choice(self.training.find(pattern)))

    def end(self) -> None:
        code = self.training.finish()
        self.codes.append(code)

    def tell(self) -> None:
        """For docs/reliability.md."""
        for line in self.training.said.splitlines():
            if line.startswith(("failure", "attempt", "interrupted", "warning: waiting")):
                print(re.sub(r"resumed from \S+", "resumed", line)[:200])


def assert_all_time_is_counted(uri: str, run: str) -> None:
    """From the first step to the last, the failure in between: the phases' growth is the time that passed."""
    grown, passed = 0.0, 0.0
    for phase in PHASES[:-1]:  # MLflow does not see the shut-down
        found = {m.step: m for m in history(uri, run, f"time/{phase.replace(' ', '_').replace('-', '_')}_s")}
        first, last = found[1], found[NUM_STEPS]
        grown, passed = grown + last.value - first.value, (last.timestamp - first.timestamp) / 1000
        assert phase != "recovery" or last.value > 3, "a restart takes longer"
    assert grown == pytest.approx(passed, rel=0.02, abs=0.3)


def worker_killed(run: Run, server: MlflowServer) -> None:
    run.begin()
    run.reach_a_random_moment()
    run.kill_one("RayTrainWorker")
    run.end()
    assert run.codes == [0], run.training.said
    how = r"worker \d was killed, or exited without an error message; (going on from step \d+|starting again)$"
    assert re.search(rf"^failure: .*{how}", run.training.said, re.MULTILINE), run.training.said
    assert_all_time_is_counted(server.uri, run.name)


def worker_frozen(run: Run, _: MlflowServer) -> None:
    """It neither dies nor answers; the others must not wait for it all night."""
    run.settings = ["cluster.timeout_s=20"]
    run.begin()
    run.reach_a_random_moment()
    frozen = run.rng.choice(run.training.find("RayTrainWorker"))
    began = time.monotonic()
    kill(frozen, signal.SIGSTOP)
    run.training.wait_for("^failure: ")
    noticed_s = time.monotonic() - began
    print(f"noticed after {noticed_s:.1f} s")
    assert noticed_s < 20 + 40  # Ray takes some 10 s to kill the group
    run.end()
    assert run.codes == [0], run.training.said


def driver_killed(run: Run, server: MlflowServer) -> None:
    run.begin()
    run.reach_a_random_moment()
    run.kill_one("pipeline.cluster.driver")
    run.end()
    assert run.codes == [0], run.training.said
    assert "failure: the driver was killed by signal 9 (SIGKILL: killed)" in run.training.said
    assert_all_time_is_counted(server.uri, run.name)


def everything_killed_and_started_again(run: Run, server: MlflowServer) -> None:
    """As when the machine loses power, but for the disk."""
    run.begin()
    run.reach_a_random_moment()
    run.training.kill()
    run.begin()
    run.end()
    assert run.codes == [0], run.training.said
    assert "attempt 2: step" in run.training.said
    assert_all_time_is_counted(server.uri, run.name)


def supervisor_killed_and_started_again(run: Run, _: MlflowServer) -> None:
    """The driver notices, saves a checkpoint and ends: not a step is lost."""
    run.begin()
    run.reach_a_random_moment()
    kill(run.training.process.pid)
    run.training.process.wait(10)
    seen = max(int(step) for step in re.findall(r"^step (\d+)/", run.training.said, re.MULTILINE))
    run.begin()
    run.end()
    assert run.codes == [0], run.training.said
    resumed = run.training.wait_for(r"attempt 2: step (\d+)")
    assert int(resumed.group(1)) >= seen


def terminated_and_started_again(run: Run, _: MlflowServer) -> None:
    run.begin()
    run.reach_a_random_moment()
    run.training.signal_group(signal.SIGTERM)
    run.end()
    stopped = run.training.wait_for(r"interrupted at step (\d+)")
    run.begin()
    run.training.wait_for(f"attempt 2: step {stopped.group(1)} of {NUM_STEPS}")  # not a step is lost
    run.end()
    assert run.codes == [130, 0], run.training.said


def mlflow_killed(run: Run, server: MlflowServer) -> None:
    run.begin()
    run.reach_a_random_moment()
    server.kill()
    time.sleep(2)
    server.start()
    run.end()
    assert run.codes == [0], run.training.said
    assert "failure" not in run.training.said
    # On a busy machine the server may not have been up again when the run ended.
    if told := re.search(r"to send them: pipeline sync (\S+)", run.training.said):
        subprocess.run([PIPELINE, "sync", told.group(1)], check=True, capture_output=True)


# With the nodes and the cluster below, 20 runs.
HARMS = {  # how often
    worker_killed: 3,
    worker_frozen: 2,
    driver_killed: 2,
    everything_killed_and_started_again: 2,
    supervisor_killed_and_started_again: 2,
    terminated_and_started_again: 3,
    mlflow_killed: 2,
}
# CI has no time for all of them; tests/e2e/test_launch.py and test_mlflow_away have the like of the last two that it
# leaves out, and the whole cluster's end below that of everything.
MARKS = {
    worker_frozen: [pytest.mark.thorough],
    supervisor_killed_and_started_again: [pytest.mark.thorough],
    terminated_and_started_again: [pytest.mark.thorough],
    mlflow_killed: [pytest.mark.thorough],
    everything_killed_and_started_again: [pytest.mark.long],
}


def seeds(number: int) -> list[Any]:
    """The first of each harm is for CI, too."""
    return [pytest.param(seed, marks=[pytest.mark.thorough] if seed else []) for seed in range(number)]


@pytest.mark.parametrize(
    ("harm", "seed"),
    [
        pytest.param(
            *(h, *s.values),
            marks=[*s.marks, *MARKS.get(h, [])],
            id=f"{h.__name__}-{s.values[0]}",
        )
        for h, n in HARMS.items()
        for s in seeds(n)
    ],
)
def test_a_killed_process_changes_nothing(
    harm: Callable[[Run, MlflowServer], None],
    seed: int,
    command: Command,
    start: Start,
    storage: Path,
    server: MlflowServer,
    undisturbed: tuple[dict[str, Any], list[Any]],
) -> None:
    run = Run(f"{harm.__name__}_{seed}", command, start, random.Random(f"{harm.__name__} {seed}"))
    harm(run, server)
    run.tell()
    assert differences(undisturbed[0], state_of(storage / run.name)) == []
    assert loss_series(server.uri, run.name) == undisturbed[1]


@pytest.mark.long
@pytest.mark.parametrize("seed", seeds(3))
def test_a_killed_node_changes_nothing(
    seed: int,
    command: Command,
    start: Start,
    storage: Path,
    server: MlflowServer,
    undisturbed: tuple[dict[str, Any], list[Any]],
    two_nodes: Cluster,
) -> None:
    """`kill -9` of a raylet; a new node takes its place while the training waits for it."""
    run = Run(f"node_{seed}", command, start, random.Random(f"node {seed}"))
    run.settings, run.env = [f"cluster.address={two_nodes.address}"], AUTHENTICATION
    run.begin()
    run.reach_a_random_moment()
    victim = two_nodes.nodes.pop(run.rng.randrange(2))
    kill(victim.raylet())
    two_nodes.add()
    run.end()
    victim.stop()
    run.tell()
    assert run.codes == [0], run.training.said
    assert "attempt 2: step" in run.training.said
    assert differences(undisturbed[0], state_of(storage / run.name)) == []
    assert loss_series(server.uri, run.name) == undisturbed[1]


@pytest.mark.long
def test_the_whole_cluster_stopped_and_started_again(
    command: Command, start: Start, storage: Path, server: MlflowServer, undisturbed: tuple[dict[str, Any], list[Any]]
) -> None:
    """The same command goes on by itself once the cluster is back."""
    port = free_port()
    run = Run("restarted", command, start, random.Random("cluster"))
    run.settings, run.env = [f"cluster.address=127.0.0.1:{port}"], AUTHENTICATION
    with cluster(port, head_cpus=2):
        run.begin()
        run.reach_a_random_moment()
    time.sleep(3)
    with cluster(port, head_cpus=2):
        run.end()
    run.tell()
    assert run.codes == [0], run.training.said
    assert "the Ray cluster is lost" in run.training.said or "the driver " in run.training.said
    assert differences(undisturbed[0], state_of(storage / run.name)) == []
    assert loss_series(server.uri, run.name) == undisturbed[1]
