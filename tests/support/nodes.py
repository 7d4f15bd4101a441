"""Ray clusters of several nodes for tests: on this machine, or on hosts of its own in network namespaces."""

import os
import secrets
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
from commands import BIN, command_line, descendants, kill

# A head of its own asks for a token.
AUTHENTICATION = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
# Ray notices a node's death by missed health checks; by default that takes up to half a minute.
QUICK_HEALTH_CHECKS = {
    "RAY_health_check_initial_delay_ms": "2000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
}
NO_DASHBOARD = ("--include-dashboard=false",)
NOTHING: Mapping[str, str] = {}


class Node:
    """`ray start --block` in a process group of its own.

    Args:
        inside: a command that runs another one where the node is to be, such as `ip netns exec NAME`.
        env: besides that of all nodes.
    """

    def __init__(
        self, *options: str, inside: tuple[str, ...] = (), num_cpus: int = 1, env: Mapping[str, str] = NOTHING
    ):
        self._folder = tempfile.TemporaryDirectory(prefix="ray")  # short: sockets' paths have a limit
        fixed = ["--block", "--disable-usage-stats", f"--num-cpus={num_cpus}", "--object-store-memory=80000000"]
        self._log = Path(self._folder.name) / "log"
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [*inside, str(BIN / "ray"), "start", *fixed, *options],
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={
                    **os.environ,
                    **AUTHENTICATION,
                    **QUICK_HEALTH_CHECKS,
                    "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "20",
                    **env,
                },
            )

    def wait_until_up(self) -> "Node":
        deadline = time.monotonic() + 60
        while "Ray runtime started" not in self._log.read_text():
            if time.monotonic() > deadline or self.process.poll() is not None:
                pytest.fail(self._log.read_text())
            time.sleep(0.1)
        return self

    def raylet(self) -> int:
        (pid,) = [p for p in descendants(self.process.pid) if "raylet/raylet" in command_line(p)]
        return pid

    def terminate(self) -> None:
        """As Kubernetes does: SIGTERM, upon which Ray drains the node."""
        os.kill(self.process.pid, signal.SIGTERM)

    def stop(self) -> None:
        for pid in [*descendants(self.process.pid), self.process.pid]:
            kill(pid)
        self.process.wait(10)
        self._folder.cleanup()


class Cluster:
    """A head without CPUs for workers, and nodes that are added; an address to join it.

    Args:
        dashboard: the head's options for one, which takes jobs.
    """

    def __init__(
        self, port: int, head_cpus: int = 0, dashboard: tuple[str, ...] = NO_DASHBOARD, env: Mapping[str, str] = NOTHING
    ):
        self.address = f"127.0.0.1:{port}"
        self.nodes: list[Node] = []
        options = ["--head", "--node-ip-address=127.0.0.1", f"--port={port}", *dashboard]
        self.head = Node(*options, num_cpus=head_cpus, env=env)
        try:
            self.head.wait_until_up()
        except BaseException:
            self.head.stop()
            raise

    def add(self, num_cpus: int = 1) -> Node:
        node = Node(f"--address={self.address}", "--node-ip-address=127.0.0.1", num_cpus=num_cpus)
        self.nodes.append(node)
        return node.wait_until_up()

    def stop(self) -> None:
        for node in [*self.nodes, self.head]:
            node.stop()


@contextmanager
def cluster(port: int, head_cpus: int = 0) -> Iterator[Cluster]:
    one = Cluster(port, head_cpus)
    try:
        yield one
    finally:
        one.stop()
