"""`pipeline doctor --cluster`: whether a cluster can train a configuration, and what to fix where it cannot.

`probes` has what the nodes try, `findings` makes a line of what each has found.
"""

import threading
import uuid
from collections.abc import Mapping
from functools import partial

from pipeline.cluster import ray_cluster
from pipeline.cluster.doctor import check_results, node_checks
from pipeline.cluster.doctor.check_results import Check
from pipeline.cluster.ray_cluster import Node
from pipeline.config.fields import show
from pipeline.config.schema import Config
from pipeline.errors import UserError
from pipeline.storage import Storage
from pipeline.tracking.mlflow_store import with_absolute_uri
from pipeline.versions import versions

PATIENCE_S = 60.0  # with a probe, whose process may have to be started first
NETWORK_PATIENCE_S = 30.0  # with workers that are to find each other
NETWORK_MEND = (
    "let the nodes' pods reach each other on all ports (NetworkPolicy, firewall), and name the interface that joins "
    "them: GLOO_SOCKET_IFNAME, and NCCL_SOCKET_IFNAME on GPUs"
)
NOT_GIVEN = "not-given"  # data.train and data.val where no configuration is given


def examine(cfg: Config) -> list[Check]:
    """All checks, on the cluster that training would use.

    Raises:
        UserError: it cannot be reached, or the configuration names a storage that is not known.
    """
    from pipeline.cluster.connection import connected
    from pipeline.tracking import find  # late: torch takes seconds

    storage = find.open_storage(cfg.run.storage)
    with connected(cfg.cluster, restarted=False, wants_stop=threading.Event()):
        there = ray_cluster.nodes()
        facts = ray_cluster.on_each_node(there, node_checks.facts, patience_s=PATIENCE_S)
        told = {name: answer.value for name, answer in facts.items() if isinstance(answer.value, dict)}
        checks = [check_results.of_nodes(there, facts, PATIENCE_S), of_workers(cfg)]
        there = {name: node for name, node in there.items() if name in told}  # the others are not waited for again
        if not there:
            return checks
        checks += [
            check_results.of_versions(told, versions()),
            check_results.of_shm(there, told),
            check_results.of_tmp(told),
        ]
        checks += [check_results.of_clocks(_clocks(there)), _try_storage(there, storage)]
        for name in ("train", "val"):
            if (source := getattr(cfg.data, name)) != NOT_GIVEN:
                checks.append(_try_data(there, cfg, f"data.{name}", Storage(source).uri))
        return [*checks, _try_mlflow(there, cfg, storage), *_try_network(there, cfg)]


def of_workers(cfg: Config) -> Check:
    """Whether the configuration's workers find room; needs Ray."""
    settings = cfg.cluster
    try:
        size = ray_cluster.size_of_worker(settings)
    except UserError as e:
        text, _, fix = str(e).partition("; ")
        return Check("workers", False, text, fix)
    room = ray_cluster.room(size)
    wanted = f"cluster.workers={show(settings.workers)}, each with {check_results.size_of(size)}"
    text = f"{wanted}; the nodes have room for {room}"
    fix = "add nodes, or lower cluster.workers or cluster.cpus_per_worker"
    return Check("workers", room >= settings.min_workers, text, fix)


def _clocks(there: Mapping[str, Node]) -> dict[str, tuple[float, float]]:
    """By the fastest of three round trips: the node's time less that of the trip's middle, and half the trip."""
    skews: dict[str, tuple[float, float]] = {}
    for _ in range(3):
        for name, one in ray_cluster.on_each_node(there, node_checks.now, patience_s=PATIENCE_S).items():
            if isinstance(one.value, BaseException):  # it has just gone; another check will say so
                continue
            skew = one.value - (one.sent_at + one.heard_at) / 2, (one.heard_at - one.sent_at) / 2
            skews[name] = min(skews.get(name, skew), skew, key=lambda pair: pair[1])
    return skews


def _try_storage(there: Mapping[str, Node], storage: Storage) -> Check:
    """One node begins a folder; each reads that and writes a file; the first reads all of these."""
    folder, writer = storage / f".doctor-{uuid.uuid4().hex}", next(iter(there))
    first = {writer: there[writer]}
    judge = partial(
        check_results.of_each,
        "storage",
        f"run.storage={storage}",
        good="what each node wrote was read back",
        fix="mount one volume there on all nodes, writable for the user that Ray runs as, or name an object store",
    )
    check = judge(first, ray_cluster.on_each_node(first, node_checks.begin, folder, patience_s=PATIENCE_S))
    if check.ok:
        answers = ray_cluster.on_each_node(there, node_checks.write, folder, writer, patience_s=PATIENCE_S)
        check = judge(there, answers)
    if check.ok:
        files = {name: answer.value for name, answer in answers.items()}
        check = judge(
            first, ray_cluster.on_each_node(first, node_checks.read_back, folder, files, patience_s=PATIENCE_S)
        )
    ray_cluster.on_each_node(first, Storage.remove, folder, patience_s=PATIENCE_S)
    return check


def _try_data(there: Mapping[str, Node], cfg: Config, key: str, source: str) -> Check:
    answers = ray_cluster.on_each_node(there, node_checks.read, source, cfg, patience_s=PATIENCE_S)
    fix = "mount the same images there on all nodes, or give their URI and the nodes its credentials"
    return check_results.of_each("data", f"{key}={source}", there, answers, good="read on each node", fix=fix)


def _try_mlflow(there: Mapping[str, Node], cfg: Config, storage: Storage) -> Check:
    """On one node that can have workers: which of them will log is not known."""
    name = next(iter(_workers(there, cfg)[1]), next(iter(there)))
    one = {name: there[name]}
    answers = ray_cluster.on_each_node(one, node_checks.log, with_absolute_uri(cfg), storage, patience_s=PATIENCE_S)
    where = answers[name].value if name in answers else ""
    good = f"{where} took a metric of the experiment {cfg.mlflow.experiment} from {name}, and deleted it"
    fix = (
        "start that server, or name another one with mlflow.uri or MLFLOW_TRACKING_URI; its NetworkPolicy and its "
        "MLFLOW_SERVER_ALLOWED_HOSTS must let the nodes in"
    )
    return check_results.of_each("MLflow", "", one, answers, good=good, fix=fix)


def _try_network(there: Mapping[str, Node], cfg: Config) -> list[Check]:
    """Sum over all workers, as a step does with its gradients; where those go by NCCL, by gloo as well.

    Each step's message to all ranks, whether to stop or to save, goes by gloo, which may take another interface.
    """
    backend, names = _workers(there, cfg)
    if len(names) < 2:
        return [Check("all-reduce", True, "one worker has no other to talk to")]
    return [_try_all_reduce(there, kind, names) for kind in dict.fromkeys((backend, "gloo"))]


def _try_all_reduce(there: Mapping[str, Node], backend: str, names: list[str]) -> Check:
    first = {names[0]: there[names[0]]}
    ports = ray_cluster.on_each_node(first, node_checks.free_port, patience_s=PATIENCE_S)
    if not (ports and isinstance(ports[names[0]].value, int)):
        return check_results.of_each("all-reduce", f"over {backend}", first, ports, good="", fix=NETWORK_MEND)
    where = f"tcp://{there[names[0]].address}:{ports[names[0]].value}"
    calls = [(there[n].id, (backend, where, rank, len(names), NETWORK_PATIENCE_S)) for rank, n in enumerate(names)]
    num_gpus = int(backend == "nccl")
    answers = ray_cluster.on_nodes(
        node_checks.all_reduce, calls, patience_s=PATIENCE_S + NETWORK_PATIENCE_S, num_gpus=num_gpus
    )
    seconds = [answer.value for answer in answers if answer and isinstance(answer.value, float)]
    if len(seconds) == len(names):
        return check_results.of_all_reduce(max(seconds), len(names), backend)
    workers = [f"{name} (rank {rank})" for rank, name in enumerate(names)]
    heard = {worker: answer for worker, answer in zip(workers, answers, strict=True) if answer}
    return check_results.of_each("all-reduce", f"over {backend}", workers, heard, good="", fix=NETWORK_MEND)


def _workers(there: Mapping[str, Node], cfg: Config) -> tuple[str, list[str]]:
    """The backend, and the node of each worker: one a GPU, else one a node with CPUs."""
    gpus = [name for name, node in there.items() for _ in range(int(node.resources.get("GPU", 0)))]
    if gpus and cfg.cluster.device != "cpu":
        return "nccl", gpus
    return "gloo", [name for name, node in there.items() if node.resources.get("CPU", 0) >= 1]
