"""`pipeline doctor`: whether a cluster can train a configuration, and what to fix where it cannot.

`node_checks` has what the nodes try and `node_hardware` what they have; `check_results`, `check_gpus` and
`check_network` make lines of it.
"""

import threading
import uuid
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from pipeline.cluster import ray_cluster
from pipeline.cluster.doctor import check_gpus, check_network, check_results, node_checks, node_hardware
from pipeline.cluster.doctor.check_results import Check
from pipeline.cluster.doctor.node_checks import AllReduce
from pipeline.cluster.doctor.node_hardware import Gpus, Links
from pipeline.cluster.ray_cluster import Answer, Node
from pipeline.config.fields import show
from pipeline.config.schema import Config
from pipeline.errors import UserError
from pipeline.storage import Storage
from pipeline.tracking.mlflow_store import with_absolute_uri
from pipeline.versions import versions

TIMEOUT_S = 60.0  # of a call, whose process may have to be started first
NETWORK_TIMEOUT_S = 30.0  # for workers to find each other
NETWORK_FIX = (
    "let the nodes' pods reach each other on all ports (NetworkPolicy, firewall), and name the interface that joins "
    "them: GLOO_SOCKET_IFNAME, and NCCL_SOCKET_IFNAME on GPUs"
)
RDMA_NEEDS = "; RDMA needs libibverbs, its device and unlimited memlock (ulimit -l; for pods k8s/overlays/rdma)"
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
        nodes = ray_cluster.nodes()
        answers = _ask(nodes, node_checks.facts)
        facts = {name: answer.value for name, answer in answers.items() if isinstance(answer.value, dict)}
        checks = [check_results.check_nodes(nodes, answers, TIMEOUT_S), check_workers(cfg)]
        nodes = {name: node for name, node in nodes.items() if name in facts}  # the others are not waited for again
        if not nodes:
            return checks
        checks += [
            check_results.check_versions(facts, versions()),
            *_look_at_gpus(nodes, cfg),
            check_results.check_shm(nodes, facts),
            check_results.check_tmp(facts),
            check_results.check_clocks(_measure_clocks(nodes)),
            _try_storage(nodes, storage),
        ]
        for name in ("train", "val"):
            if (source := getattr(cfg.data, name)) != NOT_GIVEN:
                checks.append(_try_data(nodes, cfg, f"data.{name}", Storage(source).uri))
        return [*checks, _try_mlflow(nodes, cfg, storage), *_try_network(nodes, cfg)]


def check_workers(cfg: Config) -> Check:
    """Whether the configuration's workers find room; needs Ray."""
    settings = cfg.cluster
    try:
        size = ray_cluster.size_of_worker(settings)
    except UserError as e:
        text, _, fix = str(e).partition("; ")
        return Check("workers", False, text, fix)
    room = ray_cluster.room(size)
    wanted = f"cluster.workers={show(settings.workers)}, each with {check_results.format_size(size)}"
    text = f"{wanted}; the nodes have room for {room}"
    fix = "add nodes, or lower cluster.workers or cluster.cpus_per_worker"
    return Check("workers", room >= settings.min_workers, text, fix)


def _ask(nodes: Mapping[str, Node], function: Callable[..., Any], *args: Any) -> dict[str, Answer]:
    return ray_cluster.on_each_node(nodes, function, *args, timeout_s=TIMEOUT_S)


def _look_at_gpus(nodes: Mapping[str, Node], cfg: Config) -> list[Check]:
    """Of the nodes that can have workers and have GPUs: by Ray, or by their files, which Ray counts only with NVML."""
    if cfg.cluster.device == "cpu":
        return []
    by_ray = {name for name, node in nodes.items() if node.resources.get("GPU")}
    there = {name: node for name, node in nodes.items() if name in by_ray or node.resources.get("CPU", 0) >= 1}
    answers = _ask(there, node_hardware.gpus)
    gpus = {name: _gpus_of(answers.get(name)) for name in there}
    gpus = {name: found for name, found in gpus.items() if name in by_ray or found.has_devices}
    if not gpus:
        return []
    uses_unit = cfg.data.decode_on_gpu and cfg.data.hw_decoder_load > 0
    unit = check_gpus.check_jpeg_unit(gpus) if uses_unit else None
    return [check_gpus.check_drivers(gpus), *([unit] if unit else [])]


def _gpus_of(answer: Answer | None) -> Gpus:
    if answer and isinstance(answer.value, Gpus):
        return answer.value
    trouble = check_results.first_line(answer.value) if answer else "no answer in time"
    return Gpus(has_devices=False, trouble=trouble)


def _measure_clocks(nodes: Mapping[str, Node]) -> dict[str, tuple[float, float]]:
    """By the fastest of three round trips: the node's time less that of the trip's middle, and half the trip."""
    skews: dict[str, tuple[float, float]] = {}
    for _ in range(3):
        for name, answer in _ask(nodes, node_checks.now).items():
            if isinstance(answer.value, BaseException):  # it has just gone; another check will say so
                continue
            skew = answer.value - (answer.sent_at + answer.heard_at) / 2, (answer.heard_at - answer.sent_at) / 2
            skews[name] = min(skews.get(name, skew), skew, key=lambda pair: pair[1])
    return skews


def _try_storage(nodes: Mapping[str, Node], storage: Storage) -> Check:
    """One node begins a folder; each reads that and writes a file; the first reads all of these."""
    folder, writer = storage / f".doctor-{uuid.uuid4().hex}", next(iter(nodes))
    first = {writer: nodes[writer]}
    judge = partial(
        check_results.check_each,
        "storage",
        f"run.storage={storage}",
        good="what each node wrote was read back",
        fix="mount one volume there on all nodes, writable for the user that Ray runs as, or name an object store",
    )
    check = judge(first, _ask(first, node_checks.begin, folder))
    if check.ok:
        written = _ask(nodes, node_checks.write, folder, writer)
        check = judge(nodes, written)
    if check.ok:
        files = {name: answer.value for name, answer in written.items()}
        check = judge(first, _ask(first, node_checks.read_back, folder, files))
    _ask(first, Storage.remove, folder)
    return check


def _try_data(nodes: Mapping[str, Node], cfg: Config, key: str, source: str) -> Check:
    answers = _ask(nodes, node_checks.read, source, cfg)
    fix = "mount the same images there on all nodes, or give their URI and the nodes its credentials"
    return check_results.check_each("data", f"{key}={source}", nodes, answers, good="read on each node", fix=fix)


def _try_mlflow(nodes: Mapping[str, Node], cfg: Config, storage: Storage) -> Check:
    """On one node that can have workers: which of them will log is not known."""
    name = next(iter(_workers(nodes, cfg)[1]), next(iter(nodes)))
    logging_node = {name: nodes[name]}
    answers = _ask(logging_node, node_checks.log, with_absolute_uri(cfg), storage)
    uri = answers[name].value if name in answers else ""
    good = f"{uri} took a metric of the experiment {cfg.mlflow.experiment} from {name}, and deleted it"
    fix = (
        "start that server, or name another one with mlflow.uri or MLFLOW_TRACKING_URI; its NetworkPolicy and its "
        "MLFLOW_SERVER_ALLOWED_HOSTS must let the nodes in"
    )
    return check_results.check_each("MLflow", "", logging_node, answers, good=good, fix=fix)


def _try_network(nodes: Mapping[str, Node], cfg: Config) -> list[Check]:
    """Sum over all workers, as a step does with its gradients; where those go by NCCL, by gloo as well.

    Each step's message to all ranks, whether to stop or to save, goes by gloo, which may take another interface.
    """
    backend, names = _workers(nodes, cfg)
    if len(names) < 2:
        return [Check("all-reduce", True, "not measured: one node's workers do without a network")]
    answers = _ask({name: nodes[name] for name in names}, node_hardware.links)
    links = {name: answer.value for name, answer in answers.items() if isinstance(answer.value, Links)}
    rdma = check_network.check_rdma(links, names) if backend == "nccl" else None
    reduced = [_try_all_reduce(nodes, kind, names, links) for kind in dict.fromkeys((backend, "gloo"))]
    return [*([rdma] if rdma else []), *reduced]


def _try_all_reduce(nodes: Mapping[str, Node], backend: str, names: list[str], links: Mapping[str, Links]) -> Check:
    fix = NETWORK_FIX + (RDMA_NEEDS if backend == "nccl" and any(found.rdma for found in links.values()) else "")
    judge = partial(check_results.check_each, "all-reduce", f"over {backend}", good="", fix=fix)
    first = {names[0]: nodes[names[0]]}
    ports = _ask(first, node_checks.free_port)
    if not (ports and isinstance(ports[names[0]].value, int)):
        return judge(first, ports)
    address = f"tcp://{nodes[names[0]].address}:{ports[names[0]].value}"
    calls = [(nodes[n].id, (backend, address, rank, len(names), NETWORK_TIMEOUT_S)) for rank, n in enumerate(names)]
    timeout_s, num_gpus = TIMEOUT_S + NETWORK_TIMEOUT_S, int(backend == "nccl")
    answers = ray_cluster.on_nodes(node_checks.measure_all_reduce, calls, timeout_s=timeout_s, num_gpus=num_gpus)
    results = [answer.value for answer in answers if answer and isinstance(answer.value, AllReduce)]
    if len(results) == len(names):
        return check_network.check_all_reduce(results, names, backend, links)
    workers = [f"{name} (rank {rank})" for rank, name in enumerate(names)]
    return judge(workers, {worker: answer for worker, answer in zip(workers, answers, strict=True) if answer})


def _workers(nodes: Mapping[str, Node], cfg: Config) -> tuple[str, list[str]]:
    """The backend, and the node of each worker: one a GPU, else one a node with CPUs."""
    gpus = [name for name, node in nodes.items() for _ in range(int(node.resources.get("GPU", 0)))]
    if gpus and cfg.cluster.device != "cpu":
        return "nccl", gpus
    return "gloo", [name for name, node in nodes.items() if node.resources.get("CPU", 0) >= 1]
