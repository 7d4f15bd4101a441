"""A test double of KubeRay 1.7's operator: what it does about a RayJob, in its order, with its gaps. No Kubernetes.

It follows rayjob_controller.go, which looks each 3 s; pods.py has the kubelet's part.
"""

import json
import os
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from commands import BIN
from hosts import Host, bridge
from manifests import Object
from nodes import AUTHENTICATION
from pods import Pod, Submitter

REQUEUE_S = 3.0  # RayJobDefaultRequeueDuration
FINALIZER_S = 0.2  # from the stop of the Ray job to the deletion of the cluster's pods; measured on a cluster
STATUS_TIMEOUT_S = 300.0  # RAYJOB_STATUS_CHECK_TIMEOUT_SECONDS
FINAL = ("JobStatusCheckTimeoutExceeded",)  # not tried again


class RayJob:
    """A RayJob's object, and what the operator does about it. Its manifest's paths are below /mnt.

    Args:
        hosts: for two clusters, since a retry does not wait for the pods of the one before.
    """

    def __init__(self, manifest: Object, entrypoint: str, hosts: list[Host], volumes: Path):
        self.spec, self.entrypoint = manifest["spec"], entrypoint
        self.name = str(manifest["metadata"]["name"])
        self.status, self.job_status, self.reason, self.failed = "New", "", "", 0
        self.history: list[str] = []
        self.retries: list[str] = []  # the reason of each
        self.pods: list[Pod] = []  # of the newest cluster
        self._made: list[Pod] = []
        self._hosts, self._volumes = hosts, volumes
        self._submitter: Submitter | None = None
        self._job_id, self._num_clusters, self._answered = "", 0, 0.0
        self._suspend, self._deleted, self._over = threading.Event(), threading.Event(), threading.Event()
        self._deletions: list[threading.Thread] = []
        self._operator = threading.Thread(target=self._reconcile_always)

    # What people, Kueue and tests do.

    def apply(self) -> "RayJob":
        self._operator.start()
        return self

    def suspend(self, wanted: bool = True) -> None:
        (self._suspend.set if wanted else self._suspend.clear)()

    def delete(self) -> float:
        """Delete it, and wait until nothing of it is left; for how many seconds."""
        began = time.monotonic()
        self._deleted.set()
        self._operator.join(60)
        self.wait_for_pods_to_end()
        return time.monotonic() - began

    def wait_for_pods_to_end(self) -> None:
        """Of clusters that are deleted."""
        for thread in self._deletions:
            thread.join(400)
            assert not thread.is_alive()

    def wait_for(self, status: str, timeout_s: float = 240) -> None:
        self._wait(lambda: self.status == status, status, timeout_s)

    def wait_for_step(self, step: int, timeout_s: float = 240) -> None:
        self._wait(lambda: f"\nstep {step}/" in self.read_log(), f"step {step}", timeout_s)

    def _wait(self, is_so: Callable[[], bool], what: str, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while not is_so():
            if time.monotonic() > deadline or not self._operator.is_alive():
                pytest.fail(f"{self.name}: {self.history}, no {what}\n{self.read_log()[-5000:]}")
            time.sleep(0.1)

    def read_log(self) -> str:
        """Of the newest submitter."""
        return self._log.read_text() if self._log.exists() else ""

    def end(self) -> None:
        """Whatever the state, leave no process."""
        self._over.set()
        self._deleted.set()
        self._operator.join(60)
        for pod in self._made:
            pod.kill()
        if self._submitter:
            self._submitter.delete()

    # What the operator does.

    def _reconcile_always(self) -> None:
        while not self._deleted.is_set():
            before = self.status
            self._reconcile()
            if self.status == "Failed" and self.failed < self.spec["backoffLimit"] and self.reason not in FINAL:
                self.failed += 1
                self.retries.append(self.reason)
                self.status = "Retrying"
            if self.status != before:
                self.history.append(self.status)
            self._deleted.wait(REQUEUE_S)
        if self._over.is_set():
            return
        if self.job_status in ("PENDING", "RUNNING"):
            with suppress(OSError):
                self._ask("POST", f"/api/jobs/{self._job_id}/stop")
        time.sleep(FINALIZER_S)
        self._delete_cluster()

    def _reconcile(self) -> None:
        if self.status in ("Initializing", "Running") and self._suspend.is_set():
            self.status = "Suspending"  # without a word to the Ray job
        elif self.status == "New":
            self._job_id, self.status = f"{self.name}-{time.monotonic_ns()}", "Initializing"
        elif self.status == "Initializing":
            if not self.pods:
                self._make_cluster()
            elif all(pod.is_up() for pod in self.pods):
                self._submit()
                self.status = "Running"
        elif self.status == "Running":
            self._look_at_job()
        elif self.status in ("Suspending", "Retrying"):
            self._delete_cluster()
            self.job_status, self.reason = "", ""
            self.status = "Suspended" if self.status == "Suspending" else "New"
        elif self.status == "Suspended" and not self._suspend.is_set():
            self.status = "New"
        elif self.status in ("Complete", "Failed") and self.pods:
            self._delete_cluster()  # once ttlSecondsAfterFinished has passed

    def _make_cluster(self) -> None:
        self._num_clusters += 1
        cluster = self.spec["rayClusterSpec"]
        head, group = cluster["headGroupSpec"], cluster["workerGroupSpecs"][0]
        half = len(self._hosts) // 2
        hosts = self._hosts[:half] if self._num_clusters % 2 else self._hosts[half:]
        fixed = ["--head", "--dashboard-host=0.0.0.0", "--metrics-export-port=8080"]
        joins = [f"--address={hosts[0].address}:6379"]
        for host, template, words in zip(
            hosts, [head, *[group] * (half - 1)], [fixed, *[joins] * (half - 1)], strict=True
        ):
            params = [f"--{name}={value}" for name, value in template["rayStartParams"].items()]
            ray = [*words, f"--node-ip-address={host.address}", *params]
            self.pods.append(Pod(host, ray, template["template"]["spec"], self._volumes))
            self._made.append(self.pods[-1])
            while (
                template is head and not self.pods[0].is_up() and not self._over.is_set()
            ):  # as the workers' init container does
                time.sleep(0.2)

    def _submit(self) -> None:
        [container] = self.spec["submitterPodTemplate"]["spec"]["containers"]
        dashboard = f"{self.pods[0].host.address}:8265"
        address = f"--address=http://{dashboard}"
        submit = f"ray job submit {address} --no-wait --submission-id {self._job_id} -- {self.entrypoint}"
        command = (
            f"until python -c 'from urllib.request import urlopen as u; u(\"http://{dashboard}/api/gcs_healthz\")' "
            ">/dev/null 2>&1; do echo waiting; sleep 2; done; "
            f"if ! ray job status {address} {self._job_id} >/dev/null 2>&1; then {submit}; fi; "
            f"ray job logs {address} --follow {self._job_id}"
        )
        env = os.environ | AUTHENTICATION | {"PATH": f"{BIN}:{os.environ['PATH']}", "PYTHONUNBUFFERED": "1"}
        env |= {"RAY_DASHBOARD_ADDRESS": dashboard}
        self._submitter, self._answered = (
            Submitter(container, command, env, self._log),
            time.monotonic(),
        )

    @property
    def _log(self) -> Path:
        return self._volumes / f"{self._job_id}.log"

    def _look_at_job(self) -> None:
        assert self._submitter
        if self._submitter.succeeded is False:
            self.status, self.reason = "Failed", "SubmissionFailed"
            return
        try:
            self.job_status = json.loads(self._ask("GET", f"/api/jobs/{self._job_id}"))["status"]
        except OSError:
            if time.monotonic() - self._answered > STATUS_TIMEOUT_S:
                self.status, self.reason = "Failed", "JobStatusCheckTimeoutExceeded"
            return
        self._answered = time.monotonic()
        if self._submitter.succeeded and self.job_status in ("SUCCEEDED", "FAILED", "STOPPED"):
            self.status, self.reason = ("Failed", "AppFailed") if self.job_status == "FAILED" else ("Complete", "")

    def _ask(self, method: str, path: str) -> bytes:
        url = f"http://{self.pods[0].host.address}:8265{path}"
        headers = {"x-ray-authorization": f"Bearer {AUTHENTICATION['RAY_AUTH_TOKEN']}"}
        with urllib.request.urlopen(urllib.request.Request(url, method=method, headers=headers), timeout=2) as answer:
            body: bytes = answer.read()
        return body

    def _delete_cluster(self) -> None:
        """The objects are gone at once; the pods end by and by, all at the same time, and nobody waits for them."""
        if self._submitter:
            self._submitter.delete()
        for pod in self.pods:
            self._deletions.append(threading.Thread(target=pod.delete))
            self._deletions[-1].start()
        self.pods = []


@contextmanager
def kuberay(folder: Path, num_pods: int) -> Iterator[Callable[[Object, str], RayJob]]:
    """Applies RayJobs, one at a time, on hosts of their own; what is left of them at the end is killed."""
    made: list[RayJob] = []
    with bridge(2 * num_pods) as hosts:

        def apply(manifest: Object, entrypoint: str) -> RayJob:
            made.append(RayJob(manifest, entrypoint, hosts, folder))
            return made[-1].apply()

        try:
            yield apply
        finally:
            for job in made:
                job.end()
