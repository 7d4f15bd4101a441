"""From what nodes have found out to the lines of `pipeline doctor`: ok, or bad and the fix."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline.cluster.ray_cluster import Answer, Node

MAX_NAMED = 5
GIB = 2**30
NCCL_SHM_BYTES = GIB  # what NVIDIA's guide gives a container, for GPUs that talk through shared memory
MIN_TMP_BYTES = 2 * 10**9
MAX_DISK_USE = 0.95  # above it Ray refuses work
MAX_SKEW_S = 1.0


@dataclass(frozen=True)
class Check:
    """A line: what was looked at, whether it is well (None: not known), what was found, and how to fix it."""

    name: str
    ok: bool | None
    text: str
    fix: str = ""
    figures: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        if self.ok:
            return f"ok  {self.name}: {self.text}"
        return f"{'?  ' if self.ok is None else 'bad'} {self.name}: {self.text}; {self.fix}"


def check_nodes(nodes: Mapping[str, Node], answers: Mapping[str, Answer], timeout_s: float) -> Check:
    """Whether each node answered the first call, which asks for its facts."""
    if silent := [name for name in nodes if name not in answers]:
        text = f"no answer within {timeout_s:.0f} s from {name_some(silent)}"
        return Check("nodes", False, text, "see the logs of these nodes, restart them, or drain them")
    if failed := _errors(answers):
        fix = "install this package there, best with the image that the head has"
        return Check("nodes", False, _by_reason(failed), fix)
    sizes = [f"{name} ({format_size(node.resources)})" for name, node in nodes.items()]
    return Check("nodes", True, f"{len(nodes)}: {name_some(sizes)}")


def check_versions(facts: Mapping[str, Any], here: Mapping[str, str]) -> Check:
    """Whether all nodes have what this process has."""
    versions = {node: known["versions"] for node, known in facts.items()}
    different = [
        f"{name} is {here.get(name, 'missing')} here and {there.get(name, 'missing')} on {node}"
        for node, there in versions.items()
        for name in sorted({*here, *(name for there in versions.values() for name in there)})
        if there.get(name) != here.get(name)
    ]
    text = name_some(different) or ", ".join(f"{name} {version}" for name, version in sorted(here.items()))
    return Check("versions", not different, text, "give all nodes one image, or one environment")


def check_shm(nodes: Mapping[str, Node], facts: Mapping[str, Any]) -> Check:
    """Whether /dev/shm holds Ray's object store, and NCCL's buffers where there are GPUs."""
    needed = {
        name: node.resources.get("object_store_memory", 0) + (NCCL_SHM_BYTES if node.resources.get("GPU") else 0)
        for name, node in nodes.items()
    }
    sizes = {name: known["shm"] for name, known in facts.items()}
    small = [
        f"{size / GIB:.2f} GiB where {needed[name] / GIB:.2f} are needed on {name}"
        for name, size in sizes.items()
        if size < needed[name]
    ]
    text = name_some(small) or f"at least {min(sizes.values(), default=0) / GIB:.1f} GiB"
    fix = "raise it: an emptyDir of medium Memory at /dev/shm, or docker run --shm-size; or ray start with a smaller "
    return Check("/dev/shm", not small, text, f"{fix}--object-store-memory")


def check_tmp(facts: Mapping[str, Any]) -> Check:
    """Whether the disk of the temporary directory has room for Ray's files, copies and caches."""
    sizes = {name: (known["tmp_free"], known["tmp_total"]) for name, known in facts.items()}
    full = [
        f"{free / 1e9:.1f} of {total / 1e9:.0f} GB are free on {name}"
        for name, (free, total) in sizes.items()
        if free < max(MIN_TMP_BYTES, (1 - MAX_DISK_USE) * total)
    ]
    text = name_some(full) or f"at least {min((free for free, _ in sizes.values()), default=0) / 1e9:.1f} GB free"
    fix = f"make room, at least {MIN_TMP_BYTES / 1e9:.0f} GB and {1 - MAX_DISK_USE:.0%}, below which Ray refuses work"
    return Check("temporary disk", not full, text, fix)


def check_clocks(skews: Mapping[str, tuple[float, float]]) -> Check:
    """Whether clocks agree: node -> seconds ahead of this one's, and how far that may be out."""
    off = [
        f"{name} is {abs(skew):.1f} s {'ahead' if skew > 0 else 'behind'}"
        for name, (skew, error) in skews.items()
        if abs(skew) - error > MAX_SKEW_S
    ]
    most = max((abs(skew) + error for skew, error in skews.values()), default=0.0)
    fix = "keep time with NTP on these hosts: metrics are shown by time, and object stores refuse a wrong one"
    return Check("clocks", not off, name_some(off) or f"within {most:.3f} s of this one's", fix, {"seconds": most})


def check_each(
    name: str, subject: str, nodes: Iterable[str], answers: Mapping[str, Answer], *, good: str, fix: str
) -> Check:
    """Whether a call went well on each node."""
    failed: dict[str, object] = {node: "no answer in time" for node in nodes if node not in answers}
    failed |= _errors(answers)
    text = _by_reason(failed) if failed else good
    return Check(name, not failed, f"{subject}: {text}" if subject else text, fix)


def name_some(names: Iterable[str]) -> str:
    listed = list(names)
    more = f" and {len(listed) - MAX_NAMED} more" if len(listed) > MAX_NAMED else ""
    return ", ".join(listed[:MAX_NAMED]) + more


def _errors(answers: Mapping[str, Answer]) -> dict[str, object]:
    return {node: answer.value for node, answer in answers.items() if isinstance(answer.value, BaseException)}


def first_line(error: object) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _by_reason(failed: Mapping[str, object]) -> str:
    """Nodes by reason."""
    nodes = defaultdict[str, list[str]](list)
    for name, error in failed.items():
        nodes[first_line(error)].append(name)
    return name_some(f"{reason} on {name_some(names)}" for reason, names in nodes.items())


def format_size(resources: Mapping[str, float]) -> str:
    return ", ".join(
        f"{resources.get(kind, 0):g} {kind}" for kind in ("GPU", "CPU") if resources.get(kind) or kind == "CPU"
    )
