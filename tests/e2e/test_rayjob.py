"""k8s/'s demo under a test double of KubeRay: what it sends loses no step and leaves nothing open."""

import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import mlflow
import pytest
from commands import kill
from kuberay import RayJob, kuberay
from manifests import of_kind, rendered

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

NUM_STEPS = 5000  # more than any test takes: `finish` ends it sooner
SMALL = f"model.depth=18 model.compile=none train.precision=fp32 train.global_batch=16 train.steps={NUM_STEPS}"
QUIET = "train.log_every=1 train.eval_every=1000 checkpoint.every=1000 mlflow.log_model=false mlflow.report=false"


@pytest.fixture
def volumes(tmp_path: Path, digits: Path) -> Path:
    shutil.copytree(digits, tmp_path / "data" / "digits")
    (tmp_path / "storage").mkdir()
    return tmp_path


@pytest.fixture
def apply(volumes: Path) -> Iterator[Callable[[str], RayJob]]:
    """Applies the demo's RayJob, with more settings."""
    [manifest] = of_kind(rendered("overlays/cpu-demo"), "RayJob")
    with kuberay(volumes, 1 + manifest["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["replicas"]) as apply_one:

        def apply_demo(more: str) -> RayJob:
            command = re.sub("=/(storage|data)", r"=/mnt/\1", manifest["spec"]["entrypoint"].strip())
            return apply_one(manifest, f"{command} {more}")

        yield apply_demo


def ended(volumes: Path) -> tuple[int, str]:
    """The newest checkpoint's step, and the status of the run in MLflow; run.json says that nobody trains it."""
    run = volumes / "storage" / "runs" / "digits"
    assert json.loads((run / "run.json").read_text())["open"] is False
    client = mlflow.MlflowClient(f"sqlite:///{run.parent}/mlflow.db")
    [found] = client.search_runs([one.experiment_id for one in client.search_experiments()])
    steps = [int(path.name.removeprefix("step_")) for path in (run / "checkpoints").glob("step_*")]
    return max(steps), found.info.status


def finish(job: RayJob, step: int) -> None:
    """Have the next try end there, as done."""
    job.entrypoint += f" run.stop_at_step={step}"


def resumed_at(job: RayJob) -> int:
    found = re.search(r"step (\d+) of \d+, resumed from", job.read_log())
    assert found, job.read_log()
    return int(found[1])


def last_step(job: RayJob) -> int:
    return max(int(step) for step in re.findall(r"^step (\d+)/", job.read_log(), re.MULTILINE))


def test_deleted_suspended_and_applied_again_it_goes_on_where_it_was(
    apply: Callable[[str], RayJob], volumes: Path
) -> None:
    """Deleting sends two SIGTERMs, the second by the head's preStop; suspending sends preStop's alone."""
    job = apply(f"{SMALL} {QUIET}")
    job.wait_for_step(20)
    seconds = job.delete()
    step, status = ended(volumes)
    assert step >= last_step(job) >= 20, job.read_log()[-3000:]
    assert status == "KILLED"
    print(f"deleted within {seconds:.0f} s, checkpoint at step {step}")

    job = apply(f"{SMALL} {QUIET}")
    job.wait_for_step(step + 20)
    assert resumed_at(job) == step
    job.suspend()
    job.wait_for("Suspended")
    job.wait_for_pods_to_end()
    suspended_at, status = ended(volumes)
    assert suspended_at >= step + 20
    assert status == "KILLED"

    finish(job, suspended_at + 10)
    job.suspend(False)
    job.wait_for("Complete")
    assert job.job_status == "SUCCEEDED"
    assert resumed_at(job) == suspended_at
    assert ended(volumes)[0] == suspended_at + 10


def test_a_job_that_fails_is_tried_again_and_a_wrong_setting_is_not(
    apply: Callable[[str], RayJob], volumes: Path
) -> None:
    job = apply(f"{SMALL} {QUIET} checkpoint.every=10")
    job.wait_for_step(25)
    finish(job, step := last_step(job) + 60)
    for process in job.pods[0].find("/pipeline train "):
        kill(process)
    job.wait_for("Retrying")
    job.wait_for("Complete")
    assert job.retries == ["AppFailed"]
    assert resumed_at(job) >= 20
    assert ended(volumes)[0] == step
    job.delete()

    job = apply("train.epoch=3")
    job.wait_for("Complete")
    assert (job.job_status, job.failed) == ("STOPPED", 0)
    assert "train.epoch=3: no such key; did you mean train.epochs?" in job.read_log()


@pytest.mark.long
@pytest.mark.parametrize("loss", ["all pods", "the head's host, by its network"])
def test_a_lost_head_is_done_without(apply: Callable[[str], RayJob], volumes: Path, loss: str) -> None:
    """A host that is cut off closes no connection, and its driver goes on until it finds that another one trains."""
    job = apply(f"{SMALL} {QUIET} checkpoint.every=10")
    job.wait_for_step(25)
    finish(job, step := last_step(job) + 60)  # what is cut off may go on for some steps
    began = time.monotonic()
    if loss == "all pods":
        for pod in job.pods:
            pod.kill()
    else:
        job.pods[0].host.cut_off()
    job.wait_for("Retrying", 300)
    print(f"{loss}: tried again after {time.monotonic() - began:.0f} s")
    assert job.retries == ["SubmissionFailed"]
    job.wait_for("Complete")
    assert resumed_at(job) >= 20
    assert ended(volumes)[0] == step
