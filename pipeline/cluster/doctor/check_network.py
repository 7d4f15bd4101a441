"""Lines of `pipeline doctor` about the network between workers: what it carries, beside what the hosts have for it."""

from collections import Counter
from collections.abc import Mapping, Sequence

from pipeline.cluster.doctor.check_results import Check, name_some
from pipeline.cluster.doctor.node_checks import ALL_REDUCE_BYTES, AllReduce
from pipeline.cluster.doctor.node_hardware import Links

GRADIENT_BYTES = 60_192_808 * 4  # of ResNet-152 with 1,000 classes, in fp32
MAX_GRADIENTS_S = 0.25  # on GPUs, whose backward pass is to hide it
TCP = "Socket"  # NCCL's name for it
# Of what the RDMA ports carry. Published runs of nccl-tests reach 0.4 to 0.95 of it between two hosts at 64 MiB, with
# eight ports of 400 Gb/s and with four of 100; more hosts reach less, as 64 MiB are short. By TCP it is 2 to 6 GB/s a
# host (NVIDIA/nccl, issue 450). What NCCL says it took comes first: TCP on one fast port may carry more than this.
MIN_RDMA_SHARE = 1 / 8
LOW_SHARE = 1 / 3  # of a network card, below which its speed is told
RDMA_FIX = (
    "let NCCL use the hosts' RDMA: libibverbs in the image, the RDMA device and unlimited memlock for the pods "
    "(k8s/overlays/rdma), NCCL_DEBUG=INFO says NET/IB or NET/Socket; or, where the network between these hosts carries "
    "none, set NCCL_IB_DISABLE=1"
)
PORTS_FIX = (
    "NCCL_DEBUG=INFO says which ports it took: NCCL_IB_HCA must not leave out fast ones, GPUs need GPUDirect RDMA "
    "(nvidia-peermem), and ibstat and the switches' counters must show no errors"
)
SLOW_FIX = (
    f"more than {MAX_GRADIENTS_S} s a step is hard to hide behind a backward pass: let NCCL use the fast network "
    "(NCCL_SOCKET_IFNAME, NCCL_IB_HCA; NCCL_DEBUG=INFO says which it took), or give each GPU more images a step"
)


def check_rdma(links: Mapping[str, Links], names: Sequence[str]) -> Check | None:
    """Whether NCCL finds what it needs to use the RDMA ports of nodes with GPUs; None where there are none to use."""
    with_ports = {name: links[name] for name in dict.fromkeys(names) if name in links and links[name].rdma}
    if num_hosts(links, names) < 2 or not with_ports:
        return None
    if off := [name for name, found in with_ports.items() if found.is_rdma_off]:
        return Check("RDMA", True, f"not used, as NCCL_IB_DISABLE says on {name_some(off)}")
    lacking = [
        f"{' and '.join(found.missing)} missing on {name}, whose active ports have {sum(found.rdma):g} Gb/s"
        for name, found in with_ports.items()
        if found.missing
    ]
    if lacking:
        return Check("RDMA", False, name_some(lacking), RDMA_FIX)
    if without := [name for name in dict.fromkeys(names) if name not in with_ports]:
        return Check("RDMA", True, f"active ports on {name_some(with_ports)}, but not on {name_some(without)}")
    rates = (f"{name} ({len(found.rdma)} ports, {sum(found.rdma):g} Gb/s)" for name, found in with_ports.items())
    return Check("RDMA", True, f"active on {name_some(rates)}")


def check_all_reduce(
    results: Sequence[AllReduce], names: Sequence[str], kind: str, links: Mapping[str, Links]
) -> Check:
    """What the network is worth. Bus bandwidth: what each link carries, 2 (n - 1) / n times the algorithm's.

    Args:
        results: of each worker.
        names: the node of each worker.
        links: of the nodes that have told theirs.
    """
    num_workers, seconds = len(results), max(result.seconds for result in results)
    algorithm = ALL_REDUCE_BYTES / seconds / 1e9
    bus = algorithm * 2 * (num_workers - 1) / num_workers
    gradients_s = GRADIENT_BYTES / algorithm / 1e9
    figures = {"seconds": seconds, "algorithm_gb_per_s": algorithm, "bus_gb_per_s": bus, "gradients_s": gradients_s}
    text = (
        f"{num_workers} {kind} workers, {ALL_REDUCE_BYTES // 2**20} MiB in {seconds:.4f} s: "
        f"algorithm {algorithm:.2f} GB/s, bus {bus:.2f} GB/s (times 2({num_workers}-1)/{num_workers}); "
        f"ResNet-152's {GRADIENT_BYTES / 1e6:.0f} MB of gradients take {gradients_s:.2f} s"
    )
    if networks := sorted({result.network for result in results} - {""}):
        text += f"; NCCL uses {' and '.join(networks)}"
    is_between_hosts = num_hosts(links, names) > 1
    if is_between_hosts and kind == "nccl" and (rdma := rdma_gb_per_s(links, names)):
        figures["rdma_gb_per_s"] = rdma
        text += f"; the hosts' RDMA could carry {rdma:.2f} GB/s"
        if TCP in networks or bus < rdma * MIN_RDMA_SHARE:
            fix = RDMA_FIX if TCP in networks or not networks else PORTS_FIX
            return Check("all-reduce", False, text, fix, figures)
    elif is_between_hosts and bus < LOW_SHARE * (card := min(links[name].interface for name in names) / 8):
        figures["card_gb_per_s"] = card
        text += f"; the network card of the slowest node could carry {card:.2f} GB/s"
    return Check("all-reduce", kind != "nccl" or gradients_s <= MAX_GRADIENTS_S, text, SLOW_FIX, figures)


def num_hosts(links: Mapping[str, Links], names: Sequence[str]) -> int:
    """How many machines these nodes are on; 0 where not all have told."""
    return len({links[name].host for name in names}) if all(name in links for name in names) else 0


def rdma_gb_per_s(links: Mapping[str, Links], names: Sequence[str]) -> float:
    """The bus bandwidth that the RDMA ports allow, on the host that has the least; 0 where not all could use theirs.

    Each of NCCL's rings enters and leaves a node once, however many GPUs it goes through there. So what leaves a node
    is 2 (n - 1) / n of the sum's bytes, n being the number of all workers: the bus bandwidth itself. A GPU's part goes
    by the ports near it, one at least, so no more ports than workers count; nodes on one host (pods) share its ports.

    Args:
        names: the node of each worker.
    """
    if any(links[name].is_rdma_off for name in names):
        return 0.0
    workers = Counter(links[name].host for name in names)
    nodes = Counter(links[name].host for name in set(names))
    return min(sum(links[name].rdma[: workers[host := links[name].host]]) / nodes[host] for name in names) / 8
