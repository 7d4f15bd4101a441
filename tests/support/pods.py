"""What the kubelet does to the processes of a RayJob's pods; a part of the test double in kuberay.py.

A pod is a bash process in namespaces of its own for processes, network and mounts, which runs Ray as KubeRay has it do.
Deletion is preStop, SIGTERM to the container's first process, and SIGKILL at the end of the grace period.
"""

import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

from commands import BIN, ROOT, command_line, descendants, kill
from hosts import Host
from manifests import Object
from nodes import AUTHENTICATION

# The pod's own /tmp; `volumes` is at /mnt.
IN_POD = """
set -e
mount --bind "$1" /mnt && mount --bind "$2" /tmp
exec /bin/bash -c -- "$3"
"""


class Submitter:
    """The submitter's Job: a pod, and after 10 and 20 s another one where it failed; and the kubelet's liveness probe.

    Args:
        container: its spec. log: a file that all of its pods write to.
    """

    def __init__(self, container: Object, command: str, env: dict[str, str], log: Path):
        self.succeeded: bool | None = None  # None: it has not ended
        self.log = log
        self._probe, self._command, self._env = container["livenessProbe"], command, env
        self._deleted = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def delete(self) -> None:
        self._deleted.set()
        self._thread.join(30)

    def _run(self) -> None:
        for pause_s in (0, 10, 20):
            if self._deleted.wait(pause_s):
                return
            if self._run_pod():
                self.succeeded = True
                return
        self.succeeded = False

    def _run_pod(self) -> bool:
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                ["/bin/bash", "-ce", self._command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._env,
                cwd=ROOT,
                start_new_session=True,
            )
        num_failures, asked = 0, time.monotonic()
        while process.poll() is None:
            if time.monotonic() - asked > self._probe["periodSeconds"]:
                asked = time.monotonic()
                probe = [sys.executable, *self._probe["exec"]["command"][1:]]
                is_alive = subprocess.run(probe, env=self._env, capture_output=True, check=False).returncode == 0
                num_failures = 0 if is_alive else num_failures + 1
            if self._deleted.wait(0.1) or num_failures >= self._probe["failureThreshold"]:
                for pid in [*descendants(process.pid), process.pid]:
                    kill(pid)
        return process.wait() == 0


class Pod:
    """A container's processes.

    Args:
        ray: the arguments of `ray start`, but for --block.
        spec: of the pod. volumes: a folder, which the pod has as /mnt.
    """

    def __init__(self, host: Host, ray: list[str], spec: Object, volumes: Path):
        self.spec, self.host = spec, host
        [container] = spec["containers"]
        values = {one["name"]: one["value"] for one in container["env"] if "value" in one}
        values.pop("MLFLOW_TRACKING_URI")  # a database on the volume stands for the server
        stop = container.get("lifecycle", {}).get("preStop", {"exec": {"command": []}})
        self._pre_stop = stop["exec"]["command"]
        self._env = os.environ | AUTHENTICATION | values | {"RAY_JOB_STOP_WAIT_TIME_S": "600"}  # as in the Dockerfile
        self._env |= {"PATH": f"{BIN}:{os.environ['PATH']}", "GLOO_SOCKET_IFNAME": "eth0"}
        tmp = volumes / f"tmp-{host.name}-{time.monotonic_ns()}"
        tmp.mkdir()
        self.log = tmp / "log"
        command = f"ulimit -n 65536; ray start {shlex.join(ray)} --block"
        namespaces = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        with self.log.open("wb") as log:
            self._unshare = subprocess.Popen(
                [*host.inside, *namespaces, "bash", "-c", IN_POD, "-", volumes, tmp, command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=ROOT,
                env=self._env,
                start_new_session=True,
            )

    @property
    def first_process(self) -> int:
        """The container's process 1, by its number out here."""
        children = Path(f"/proc/{self._unshare.pid}/task/{self._unshare.pid}/children").read_text().split()
        return int(children[0])

    def find(self, pattern: str) -> list[int]:
        """Its processes whose command line contains `pattern`."""
        return [pid for pid in descendants(self._unshare.pid) if pattern in command_line(pid)]

    def is_up(self) -> bool:
        assert self._unshare.poll() is None, self.log.read_text()
        return "Ray runtime started" in self.log.read_text()

    def inside(self, *command: str) -> "subprocess.Popen[bytes]":
        enter = ["nsenter", "--target", str(self.first_process), "--pid", "--mount", "--net"]
        return subprocess.Popen([*enter, f"--wdns={ROOT}", *command], env=self._env, start_new_session=True)

    def delete(self) -> None:
        """As the kubelet does, and wait for it."""
        if self._unshare.poll() is not None:
            return
        deadline = time.monotonic() + self.spec["terminationGracePeriodSeconds"]
        if self._pre_stop:
            with suppress(subprocess.TimeoutExpired):
                self.inside(*self._pre_stop).wait(deadline - time.monotonic())
        with suppress(IndexError, OSError):  # it has ended by itself
            os.kill(self.first_process, signal.SIGTERM)
        try:
            self._unshare.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        """As the loss of its power does."""
        for pid in [*descendants(self._unshare.pid), self._unshare.pid]:
            kill(pid)
        self._unshare.wait(10)
