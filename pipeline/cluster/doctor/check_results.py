"""From what nodes have found out to the lines of `pipeline doctor`: ok, or bad and the fix."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline.cluster.doctor import node_checks
from pipeline.cluster.ray_cluster import Answer, Node

MAX_NAMED = 5
GIB = 2**30
NCCL_SHM_BYTES = GIB  # what NVIDIA's guide gives a container, for GPUs that talk through shared memory
MIN_TMP_BYTES = 2 * 10**9
MAX_DISK_USE = 0.95  # above it Ray refuses work
MAX_SKEW_S = 1.0
GRADIENT_BYTES = 60_192_808 * 4  # of ResNet-152 with 1,000 classes, in fp32
MAX_GRADIENTS_S = 0.25  # on GPUs, whose backward pass is to hide it


@dataclass(frozen=True)
class Check:
    """A line: what was looked at, whether it is well, what was found, and how to fix it."""

    name: str
    ok: bool
    text: str
    fix: str = ""
    figures: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"ok  {self.name}: {self.text}" if self.ok else f"bad {self.name}: {self.text}; {self.fix}"


def of_nodes(there: Mapping[str, Node], answers: Mapping[str, Answer], patience_s: float) -> Check:
    """Whether each node ran the first probe."""
    silent = [name for name in there if name not in answers]
    failed = {name: answer.value for name, answer in answers.items() if isinstance(answer.value, BaseException)}
    if silent:
        text = f"no answer within {patience_s:.0f} s from {names_of(silent)}"
        return Check("nodes", False, text, "see the logs of these nodes, restart them, or drain them")
    if failed:
        fix = "install this package there, best with the image that the head has"
        return Check("nodes", False, _failures(failed), fix)
    sizes = [f"{name} ({size_of(node.resources)})" for name, node in there.items()]
    return Check("nodes", True, f"{len(there)}: {names_of(sizes)}")


def of_versions(facts: Mapping[str, Any], here: Mapping[str, str]) -> Check:
    """Whether all nodes have what this process has."""
    names = {name for one in facts.values() for name in one["versions"]} | set(here)
    different = [
        f"{name} is {here.get(name, 'missing')} here and {one['versions'].get(name, 'missing')} on {node}"
        for node, one in facts.items()
        for name in sorted(names)
        if one["versions"].get(name) != here.get(name)
    ]
    text = names_of(different) or ", ".join(f"{name} {version}" for name, version in sorted(here.items()))
    return Check("versions", not different, text, "give all nodes one image, or one environment")


def of_shm(there: Mapping[str, Node], facts: Mapping[str, Any]) -> Check:
    """Whether /dev/shm holds Ray's object store, and NCCL's buffers where there are GPUs."""
    needed = {
        name: node.resources.get("object_store_memory", 0) + (NCCL_SHM_BYTES if node.resources.get("GPU") else 0)
        for name, node in there.items()
    }
    small = [
        f"{one['shm'] / GIB:.2f} GiB where {needed[name] / GIB:.2f} are needed on {name}"
        for name, one in facts.items()
        if one["shm"] < needed[name]
    ]
    least = min((one["shm"] for one in facts.values()), default=0)
    fix = "raise it: an emptyDir of medium Memory at /dev/shm, or docker run --shm-size; or ray start with a smaller "
    return Check(
        "/dev/shm", not small, names_of(small) or f"at least {least / GIB:.1f} GiB", f"{fix}--object-store-memory"
    )


def of_tmp(facts: Mapping[str, Any]) -> Check:
    """Whether the disk of the temporary directory has room for Ray's files, copies and caches."""
    full = [
        f"{one['tmp_free'] / 1e9:.1f} of {one['tmp_total'] / 1e9:.0f} GB are free on {name}"
        for name, one in facts.items()
        if one["tmp_free"] < MIN_TMP_BYTES or one["tmp_free"] < (1 - MAX_DISK_USE) * one["tmp_total"]
    ]
    least = min((one["tmp_free"] for one in facts.values()), default=0)
    fix = f"make room, at least {MIN_TMP_BYTES / 1e9:.0f} GB and {1 - MAX_DISK_USE:.0%}, below which Ray refuses work"
    return Check("temporary disk", not full, names_of(full) or f"at least {least / 1e9:.1f} GB free", fix)


def of_clocks(skews: Mapping[str, tuple[float, float]]) -> Check:
    """Whether clocks agree: node -> seconds ahead of this one's, and how far that may be out."""
    off = [
        f"{name} is {abs(skew):.1f} s {'ahead' if skew > 0 else 'behind'}"
        for name, (skew, error) in skews.items()
        if abs(skew) - error > MAX_SKEW_S
    ]
    most = max((abs(skew) + error for skew, error in skews.values()), default=0.0)
    fix = "keep time with NTP on these hosts: metrics are shown by time, and object stores refuse a wrong one"
    return Check("clocks", not off, names_of(off) or f"within {most:.3f} s of this one's", fix, {"seconds": most})


def of_each(name: str, what: str, there: Iterable[str], answers: Mapping[str, Answer], *, good: str, fix: str) -> Check:
    """Whether a probe went well on each node."""
    failed: dict[str, object] = {node: "no answer in time" for node in there if node not in answers}
    failed |= {node: answer.value for node, answer in answers.items() if isinstance(answer.value, BaseException)}
    text = _failures(failed) if failed else good
    return Check(name, not failed, f"{what}: {text}" if what else text, fix)


def of_all_reduce(seconds: float, num_workers: int, kind: str) -> Check:
    """What the network is worth. Bus bandwidth: what each link carries, 2 (n - 1) / n times the algorithm's."""
    algorithm = node_checks.ALL_REDUCE_BYTES / seconds / 1e9
    bus = algorithm * 2 * (num_workers - 1) / num_workers
    gradients_s = GRADIENT_BYTES / algorithm / 1e9
    figures = {"seconds": seconds, "algorithm_gb_per_s": algorithm, "bus_gb_per_s": bus, "gradients_s": gradients_s}
    text = (
        f"{num_workers} {kind} workers, {node_checks.ALL_REDUCE_BYTES // 2**20} MiB in {seconds:.4f} s: "
        f"algorithm {algorithm:.2f} GB/s, bus {bus:.2f} GB/s (times 2({num_workers}-1)/{num_workers}); "
        f"ResNet-152's {GRADIENT_BYTES / 1e6:.0f} MB of gradients take {gradients_s:.2f} s"
    )
    fix = (
        f"more than {MAX_GRADIENTS_S} s a step is hard to hide behind a backward pass: let NCCL use the fast network "
        "(NCCL_SOCKET_IFNAME, NCCL_IB_HCA; NCCL_DEBUG=INFO says which it took), or give each GPU more images a step"
    )
    return Check("all-reduce", kind != "nccl" or gradients_s <= MAX_GRADIENTS_S, text, fix, figures)


def names_of(names: Iterable[str]) -> str:
    listed = list(names)
    more = f" and {len(listed) - MAX_NAMED} more" if len(listed) > MAX_NAMED else ""
    return ", ".join(listed[:MAX_NAMED]) + more


def _failures(failed: Mapping[str, object]) -> str:
    """Nodes by reason."""
    nodes = defaultdict[str, list[str]](list)
    for name, error in failed.items():
        nodes[(str(error).strip() or type(error).__name__).splitlines()[0]].append(name)
    return names_of(f"{reason} on {names_of(some)}" for reason, some in nodes.items())


def size_of(resources: Mapping[str, float]) -> str:
    return ", ".join(
        f"{resources.get(kind, 0):g} {kind}" for kind in ("GPU", "CPU") if resources.get(kind) or kind == "CPU"
    )
