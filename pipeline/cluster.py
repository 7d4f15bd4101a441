"""Ray's cluster: joining or starting one, what a worker takes of it, and who comes and goes."""

import os
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
import ray.job_config
from ray._private.state import state  # see `draining`
from ray._private.worker import get_dashboard_url
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline import machine
from pipeline.config import ClusterConfig, ConfigError

OBJECT_STORE_BYTES = 100 * 2**20  # nothing goes through it but messages
CONNECT_SECONDS = 10.0
RESERVE_SECONDS = 10.0  # within which a placement group is ready, or some node has gone
# How long a group that has failed is asked to take its leave, before it is killed: a frozen one never does.
ENVIRONMENT = {"TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "5"}
QUIET = {"logging_level": "ERROR", "log_to_driver": False}

Size = dict[str, float]  # {"CPU": ..., "GPU": ...} of one worker


class JobConfig(ray.job_config.JobConfig):  # type: ignore[misc]  # what comes from ray is Any
    """Ray's, but the driver's working directory does not go first on its workers' path: it may hold a random.py."""

    def _runtime_env_has_working_dir(self) -> bool:  # Ray asks before it adds the directory, and nowhere else
        return True


@dataclass(frozen=True)
class Node:
    """A node of the cluster. address: its IP. resources: Ray's, such as CPU, GPU and object_store_memory (bytes)."""

    id: str
    address: str
    resources: Size


@dataclass(frozen=True)
class Answer:
    """What a function returned or raised on a node; when it was asked and heard, Unix seconds here."""

    value: Any
    asked: float
    heard: float


def join(address: str, patience_s: float, wants_stop: threading.Event) -> None:
    """Connect to a running cluster; one that is away is waited for, unless that is to stop.

    Raises:
        OSError, RuntimeError, ValueError: it does not answer.
    """
    deadline = time.monotonic() + patience_s
    while True:
        try:
            host, colon, port = address.rpartition(":")
            if colon and port.isdecimal():  # Ray would try for many minutes
                socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
            ray.init(address=address, runtime_env={"env_vars": ENVIRONMENT}, job_config=JobConfig(), **QUIET)
            return
        except (OSError, RuntimeError):
            if time.monotonic() > deadline or wants_stop.wait(1):
                raise


def start(num_cpus: int) -> None:
    """Start a cluster on this machine, with its cores, or so many CPUs: more workers than cores are slow but work."""
    os.environ.update(ENVIRONMENT)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # 15, Ray's default, would let all else on the machine go first
    ray.init(
        address="local",
        num_cpus=max(machine.cpu_count(), num_cpus),
        object_store_memory=OBJECT_STORE_BYTES,
        include_dashboard=False,
        job_config=JobConfig(),
        **QUIET,
    )


def has_dashboard() -> bool:
    """Whether the cluster has Ray's dashboard, which also answers questions on its state."""
    return bool(get_dashboard_url())


def size_of_worker(cfg: ClusterConfig) -> Size:
    """What one worker takes: a GPU where the cluster has them, and an even share of the CPUs.

    Raises:
        ConfigError: fewer GPUs than workers, where no node can come.
    """
    nodes = _nodes()
    num_gpus = int(sum(node.get("GPU", 0) for node in nodes))
    use_gpu = cfg.device == "gpu" or (cfg.device == "auto" and num_gpus > 0)
    can_grow = cfg.device == "gpu" and (cfg.address or os.environ.get("RAY_ADDRESS"))
    if use_gpu and num_gpus < cfg.min_workers and not can_grow:
        raise ConfigError(
            f"cluster.workers={cfg.workers}: the cluster has {num_gpus} GPUs, and each worker takes one; "
            f"set cluster.workers={max(num_gpus, 1)} or cluster.device=cpu"
        )
    num_cpus = cfg.cpus_per_worker or _even_share([int(node.get("CPU", 0)) for node in nodes], cfg.max_workers)
    return {"CPU": num_cpus, "GPU": int(use_gpu)}


def _even_share(cpus: list[int], num_workers: int) -> int:
    """The most CPUs that each of `num_workers` can have, when none spans two nodes; at least one."""
    shares = range(max(cpus, default=1), 0, -1)
    return next((share for share in shares if sum(n // share for n in cpus) >= num_workers), 1)


def reserve(size: Size, low: int, high: int) -> int:
    """How many workers, from `low` to `high`, there is room for now; 0 if for fewer than `low`.

    The room is taken for a moment: what Ray says of a node may be from before its death.
    """
    could_be, free = _capacity(size, _nodes()), _capacity(size, [ray.available_resources()])
    for num_workers in sorted({min(high, could_be), min(high, free), low}, reverse=True):
        if num_workers >= low:
            with Place(size, num_workers) as place:
                if place.granted(RESERVE_SECONDS):
                    return num_workers
    return 0


class Place:
    """A wish for room for so many workers, held until it is given back; an autoscaler sees it, and makes room."""

    def __init__(self, size: Size, num_workers: int):
        self._group = placement_group([size] * num_workers)

    def granted(self, patience_s: float = 0) -> bool:
        return bool(self._group.wait(patience_s))

    def __enter__(self) -> "Place":
        return self

    def __exit__(self, *exc: object) -> None:
        remove_placement_group(self._group)


def room(size: Size) -> int:
    """How many such workers the nodes could hold, were they free."""
    return _capacity(size, _nodes())


def _capacity(size: Size, nodes: list[dict[str, float]]) -> int:
    return sum(int(min(node.get(kind, 0) // n for kind, n in size.items() if n)) for node in nodes)


def draining() -> set[str]:
    """The ids of the nodes that are about to go.

    Ray's public way to ask, `ray.train.get_preemption_info()`, is a barrier over all ranks.
    """
    return set(state.get_draining_nodes())


def why_waiting(cfg: ClusterConfig, size: Size) -> str:
    """In words, for a training that has no workers yet."""
    total, free = ray.cluster_resources(), ray.available_resources()
    takes = ", ".join(f"{n:g} {kind}" for kind, n in size.items() if n)
    has = ", ".join(f"{free.get(kind, 0):g} of {total.get(kind, 0):g} {kind} free" for kind, n in size.items() if n)
    return f"waiting for {cfg.min_workers} workers; each takes {takes}; the cluster has {has}"


def _nodes() -> list[dict[str, float]]:
    """The resources of each node that is up and stays."""
    return [node.resources for node in nodes().values()]


def nodes() -> dict[str, Node]:
    """The nodes that are up and stay, by their hosts' or pods' names, with an id where a host has two."""
    there = [n for n in ray.nodes() if n["Alive"] and n["NodeID"] not in draining()]
    hosts = [n["NodeManagerHostname"] for n in there]
    alone = [hosts.count(host) == 1 for host in hosts]
    names = [h if one else f"{h}/{n['NodeID'][:6]}" for h, one, n in zip(hosts, alone, there, strict=True)]
    made = (Node(n["NodeID"], n["NodeManagerAddress"], dict(n["Resources"])) for n in there)
    return dict(sorted(zip(names, made, strict=True)))


def on_each_node(
    there: Mapping[str, Node], function: Callable[..., Any], *args: Any, patience_s: float
) -> dict[str, Answer]:
    """Call `function(*args)` on each node, though it be busy; a node that does not answer in time is left out."""
    answers = on_nodes(function, [(node.id, args) for node in there.values()], patience_s=patience_s)
    return {name: answer for name, answer in zip(there, answers, strict=True) if answer}


def on_nodes(
    function: Callable[..., Any], calls: Sequence[tuple[str, tuple[Any, ...]]], *, patience_s: float, num_gpus: int = 0
) -> list[Answer | None]:
    """Call `function` on nodes at the same time, each given by id and arguments; None for no answer in time."""
    task = ray.remote(function)
    asked: dict[Any, tuple[int, float]] = {}
    for number, (node, args) in enumerate(calls):
        pinned = NodeAffinitySchedulingStrategy(node, soft=False)
        ref = task.options(num_cpus=0, num_gpus=num_gpus, max_retries=0, scheduling_strategy=pinned).remote(*args)
        asked[ref] = (number, time.time())
    answers: list[Answer | None] = [None] * len(calls)
    waiting, deadline = list(asked), time.monotonic() + patience_s
    while waiting:
        done, waiting = ray.wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
        if not done:
            break
        heard, (number, since) = time.time(), asked[done[0]]
        try:
            value = ray.get(done[0])
        except ray.exceptions.RayError as e:
            value = getattr(e, "cause", e)
        answers[number] = Answer(value, since, heard)
    for ref in waiting:
        ray.cancel(ref, force=True)
    return answers
