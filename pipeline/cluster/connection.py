"""The way to Ray: a running cluster is joined, or one is started on this machine, with only what a training needs.

`ray.init()` would also start an autoscaler, a dashboard's server and a log monitor. Each is a Python process that takes
its part of a small machine, at the start and for as long as it runs, and here nobody asks them anything. So the node is
started as `ray.init()` does it, but without these, and then joined.
"""

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import psutil
import ray
import ray.job_config
from ray._private.authentication.authentication_token_setup import (
    enable_token_auth_by_default,
    ensure_token_if_auth_enabled,
)
from ray._private.node import Node
from ray._private.parameter import RayParams

from pipeline import machine
from pipeline.cluster import ray_start
from pipeline.config.running import ClusterConfig
from pipeline.errors import UserError
from pipeline.failures import DISCONNECT_S, ClusterLostError, Interrupted
from pipeline.text import last_telling_line, signal_in_words

OBJECT_STORE_BYTES = 100 * 2**20  # nothing goes through it but messages
CONNECT_S = 10.0
DISCONNECT_QUIETLY_S = 3.0
START_TIMEOUT_S = 600  # for the workers' processes, also where an image has to be pulled first
QUIET = {"logging_level": "ERROR", "log_to_driver": False}
# For a cluster of one machine. Ray's defaults are for a thousand nodes, an autoscaler and a dashboard.
LOCAL_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # 15, Ray's default, would let all else on the machine go first
    "RAY_prestart_worker_first_driver": "0",  # none of the processes that Ray would start ahead fits
    # Nobody reads the metrics of Ray's own processes here, and collecting them took as much of a core as all else.
    "RAY_enable_metrics_collection": "0",
    "RAY_metrics_report_interval_ms": "60000",
    "REPORTER_UPDATE_INTERVAL_MS": "60000",
    "RAY_event_stats": "0",
    # Each wakes the raylet some times a second, for what there is none of here: idle tasks, and objects that move.
    "RAY_kill_idle_workers_interval_ms": "2000",
    "RAY_raylet_check_gc_period_milliseconds": "5000",
    "RAY_object_manager_timer_freq_ms": "1000",
}


class JobConfig(ray.job_config.JobConfig):  # type: ignore[misc]  # what comes from ray is Any
    """Ray's, but the driver's working directory does not go first on its workers' path: it may hold a random.py."""

    def _runtime_env_has_working_dir(self) -> bool:  # Ray asks before it adds the directory, and nowhere else
        return True


@contextmanager
def connected(
    cfg: ClusterConfig,
    restarted: bool,
    wants_stop: threading.Event,
    warn: Callable[[str], None] = lambda _: None,
    beforehand: Callable[[], None] = lambda: None,
) -> Iterator[None]:
    """Connect to the cluster that the configuration or $RAY_ADDRESS names, else start one on this machine.

    Args:
        restarted: wait for a cluster that is away: it was there before.
        warn: told of a start of Ray's that failed and is tried again.
        beforehand: called when Ray's processes are there, before this one connects to them.

    Raises:
        UserError: there is none.
        ClusterLostError: there is none any more; or it was lost in what is done inside.
        Interrupted: it was to stop.
    """
    for name, value in _environment(cfg).items():
        os.environ.setdefault(name, value)
    address = cfg.address or os.environ.get("RAY_ADDRESS")
    with ExitStack() as stack:
        try:
            if address:
                beforehand()
                join(address, cfg.timeout_s if restarted else 0, wants_stop, _for_workers())
            else:
                stack.enter_context(_local_cluster(cfg, warn, wants_stop, beforehand))
        except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as e:
            if wants_stop.is_set():
                raise Interrupted from None
            if isinstance(e, ray_start.RayStartError):
                raise (ClusterLostError(str(e)) if restarted else e) from None
            reason = f"cluster.address={address} cannot be reached: {str(e).splitlines()[0]}"
            raise (ClusterLostError(reason) if restarted else UserError(reason)) from None
        stack.callback(_disconnect, warn)
        try:
            yield
        except ray.exceptions.RayError as e:
            raise ClusterLostError(f"the Ray cluster is lost: {last_line(e)}") from e


def _disconnect(warn: Callable[[str], None]) -> None:
    """Leave the cluster; a raylet that stands still (a node in swap, SIGSTOP) would be waited for without end."""
    leaving = threading.Thread(target=ray.shutdown, daemon=True)
    leaving.start()
    leaving.join(DISCONNECT_QUIETLY_S)
    if leaving.is_alive():
        warn(f"Ray does not answer; waiting {DISCONNECT_S:.0f} s for it to end, all else is done")
        leaving.join(DISCONNECT_S)


def last_line(error: BaseException) -> str:
    """The last line of a failed worker's traceback, or what Ray says of its end, without Ray's guesses."""
    said = last_telling_line(str(error).partition(" Some common causes")[0])
    return said.rstrip(".") or type(error).__name__


def how_it_ended(rank: int, error: BaseException, crash: str | None) -> str:
    """What became of a worker, in words that need no knowledge of Ray.

    Args:
        crash: the signal that a process of it told of, as the system calls it; of SIGKILL none can.
    """
    said = str(error)
    if "node has died" in said:
        return f"worker {rank} is lost with its node, which died or was cut off"
    if "worker process has died" not in said:
        return f"worker {rank} failed: {last_line(error)}"
    number = next((n for n in signal.valid_signals() if signal.strsignal(n) == crash), None)
    if number is not None:
        return f"worker {rank} was killed by {signal_in_words(number)}"
    return f"worker {rank} " + (f"crashed: {crash}" if crash else "was killed, or exited without an error message")


def _environment(cfg: ClusterConfig) -> dict[str, str]:
    """What all processes of a training get, unless the user says otherwise."""
    return {
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(max(cfg.timeout_s, START_TIMEOUT_S)),
        "RAY_TRAIN_COLLECTIVE_TIMEOUT_S": str(cfg.timeout_s),
        "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": str(cfg.timeout_s),
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # an actor a group; the driver looks itself
    }


def _for_workers() -> dict[str, str]:
    """Ray Train's variables, for workers on other machines; but those of the Ray job they have already."""
    from ray.train.v2._internal.constants import get_env_vars_to_propagate  # late: it takes part of a second

    config = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}")
    of_job = (config.get("runtime_env") or {}).get("env_vars") or {}  # Ray refuses to be given them once more
    return {name: value for name, value in get_env_vars_to_propagate().items() if name not in of_job}


def join(
    address: str,
    timeout_s: float = 0,
    wants_stop: threading.Event | None = None,
    environment: Mapping[str, str] | None = None,
) -> None:
    """Connect to a running cluster.

    Args:
        timeout_s: how long to wait for one that is away.
        wants_stop: ends that wait when it is set.
        environment: variables that the job's processes get in addition to their node's.

    Raises:
        OSError, RuntimeError, ValueError: it does not answer.
    """
    runtime_env = {"env_vars": dict(environment)} if environment else None
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            host, colon, port = address.rpartition(":")
            if colon and port.isdecimal():  # Ray would try for many minutes
                socket.create_connection((host.strip("[]"), int(port)), CONNECT_S).close()
            ray.init(address=address, runtime_env=runtime_env, job_config=JobConfig(), **QUIET)
            return
        except (OSError, RuntimeError):
            if time.monotonic() > deadline or (wants_stop or threading.Event()).wait(1):
                raise


@contextmanager
def _local_cluster(
    cfg: ClusterConfig, warn: Callable[[str], None], wants_stop: threading.Event, beforehand: Callable[[], None]
) -> Iterator[None]:
    """A cluster on this machine, with its cores or a CPU for each worker: more workers than cores are slow but work."""
    for name, value in LOCAL_SETTINGS.items():
        os.environ.setdefault(name, value)
    num_cpus = max(cores := machine.cpu_count(), cfg.max_workers * (cfg.cpus_per_worker or 1))
    if num_cpus > cores and (cfg.cpus_per_worker or 1) > 1:
        warn(
            f"cluster.cpus_per_worker={cfg.cpus_per_worker}: {num_cpus} threads wait for each other on {cores} cores, "
            f"which is several times slower; set cluster.cpus_per_worker={max(1, cores // cfg.max_workers)}"
        )

    def start_node() -> Node:
        enable_token_auth_by_default()  # else any user of this machine could run code as this one
        ensure_token_if_auth_enabled(create_token_if_missing=True)
        parameters = RayParams(
            num_cpus=num_cpus,
            object_store_memory=OBJECT_STORE_BYTES,
            no_monitor=True,
            include_log_monitor=False,
            dashboard_agent_listen_port=0,  # any free one: where its usual one is taken, it tries for seconds
        )
        # Its processes end with the thread that starts them, too.
        node = _LocalNode(parameters, head=True, shutdown_at_exit=False, spawn_reaper=True)
        beforehand()
        join(node.address)
        return node

    others = set(psutil.Process().children(recursive=True))
    node = ray_start.start_with_retries(start_node, warn, wants_stop)
    try:
        yield
    finally:
        machine.kill_descendants(
            others
        )  # Ray's agents among them, which would look for their raylet for a minute or more
        node.kill_all_processes(check_alive=False, allow_graceful=False)


class _LocalNode(Node):  # type: ignore[misc]  # what comes from ray is Any
    def start_api_server(self, **arguments: Any) -> None:
        """Leave the dashboard's server out: without a dashboard Ray would start it all the same."""
