"""Ray's cluster: what a worker takes of it, and who comes and goes."""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray._private.state import state  # see `draining`
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.config.running import ClusterConfig
from pipeline.errors import UserError

RESERVE_S = 10.0  # within which a placement group is ready, or some node has gone

Size = dict[str, float]  # {"CPU": ..., "GPU": ...} of one worker


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
    sent_at: float
    heard_at: float


def size_of_worker(cfg: ClusterConfig) -> Size:
    """What one worker takes: a GPU where the cluster has them, and an even share of the CPUs.

    Raises:
        UserError: fewer GPUs than workers, where no node can come.
    """
    nodes = _nodes()
    num_gpus = int(sum(node.get("GPU", 0) for node in nodes))
    use_gpu = cfg.device == "gpu" or (cfg.device == "auto" and num_gpus > 0)
    can_grow = cfg.device == "gpu" and (cfg.address or os.environ.get("RAY_ADDRESS"))
    if use_gpu and num_gpus < cfg.min_workers and not can_grow:
        raise UserError(
            f"cluster.workers={cfg.workers}: the cluster has {num_gpus} GPUs, and each worker takes one; "
            f"set cluster.workers={max(num_gpus, 1)} or cluster.device=cpu"
        )
    num_cpus = cfg.cpus_per_worker or _even_share([int(node.get("CPU", 0)) for node in nodes], cfg.max_workers)
    return {"CPU": num_cpus, "GPU": int(use_gpu)}


def _even_share(cpus: list[int], num_workers: int) -> int:
    """The most CPUs that each of `num_workers` can have, when none spans two nodes; at least one."""
    shares = range(max(cpus, default=1), 0, -1)
    return next((share for share in shares if sum(n // share for n in cpus) >= num_workers), 1)


def reserve(size: Size, low: int, high: int) -> "Reservation | None":
    """Room for as many workers as there is now, from `low` to `high`; None where there is for fewer than `low`.

    It is taken to be seen: what Ray says of a node may be from before its death.
    """
    could_be, free = _capacity(size, _nodes()), _capacity(size, [ray.available_resources()])
    for num_workers in sorted({min(high, could_be), min(high, free), low}, reverse=True):
        if num_workers >= low:
            place = Reservation(size, num_workers)
            if place.granted(RESERVE_S):
                return place
            place.give_back()
    return None


class Reservation:
    """A wish for room for so many workers, held until it is given back; an autoscaler sees it, and makes room."""

    def __init__(self, size: Size, num_workers: int):
        self.num_workers, self.group = num_workers, placement_group([size] * num_workers)

    def granted(self, timeout_s: float = 0) -> bool:
        return bool(self.group.wait(timeout_s))

    def give_back(self) -> None:
        remove_placement_group(self.group)

    def __enter__(self) -> "Reservation":
        return self

    def __exit__(self, *exc: object) -> None:
        self.give_back()


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
    there: Mapping[str, Node], function: Callable[..., Any], *args: Any, timeout_s: float
) -> dict[str, Answer]:
    """Call `function(*args)` on each node, though it be busy; a node that does not answer in time is left out."""
    answers = on_nodes(function, [(node.id, args) for node in there.values()], timeout_s=timeout_s)
    return {name: answer for name, answer in zip(there, answers, strict=True) if answer}


def on_nodes(
    function: Callable[..., Any], calls: Sequence[tuple[str, tuple[Any, ...]]], *, timeout_s: float, num_gpus: int = 0
) -> list[Answer | None]:
    """Call `function` on nodes at the same time, each given by id and arguments; None for no answer in time."""
    task = ray.remote(function)
    sent_at: dict[Any, tuple[int, float]] = {}
    for number, (node, args) in enumerate(calls):
        pinned = NodeAffinitySchedulingStrategy(node, soft=False)
        ref = task.options(num_cpus=0, num_gpus=num_gpus, max_retries=0, scheduling_strategy=pinned).remote(*args)
        sent_at[ref] = (number, time.time())
    answers: list[Answer | None] = [None] * len(calls)
    waiting, deadline = list(sent_at), time.monotonic() + timeout_s
    while waiting:
        done, waiting = ray.wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
        if not done:
            break
        heard_at, (number, since) = time.time(), sent_at[done[0]]
        try:
            value = ray.get(done[0])
        except ray.exceptions.RayError as e:
            value = getattr(e, "cause", e)
        answers[number] = Answer(value, since, heard_at)
    for ref in waiting:
        ray.cancel(ref, force=True)
    return answers
