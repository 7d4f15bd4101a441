"""Whether pods find room on nodes, as Kubernetes' scheduler would place them: by requests, labels and taints.

Not looked at: affinities, spread constraints, and volumes that tie a pod to a node.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from pipeline.cluster.doctor.check_results import GIB, Check, name_some
from pipeline.cluster.doctor.kubectl import Object
from pipeline.cluster.doctor.manifests import GPU, Pods, labels_of, name_of, requests, thousandths


@dataclass(frozen=True)
class Room:
    """A node that takes pods. offered: what pods may ask for; free: what of it none has asked for; see `requests`."""

    name: str
    labels: Mapping[str, str]
    taints: Sequence[Object]
    offered: "Counter[str]"
    free: "Counter[str]"

    def is_labelled_for(self, pod: Object) -> bool:
        return bool(pod.get("nodeSelector", {}).items() <= self.labels.items())

    def taints_against(self, pod: Object) -> list[str]:
        return [
            f"{taint['key']}={taint.get('value', '')}:{taint['effect']}"
            for taint in self.taints
            if taint["effect"] != "PreferNoSchedule"
            and not any(_tolerates(one, taint) for one in pod.get("tolerations", []))
        ]

    def takes(self, pods: Pods) -> bool:
        fits = all(self.free[kind] >= amount for kind, amount in pods.requests.items())
        return fits and self.is_labelled_for(pods.spec) and not self.taints_against(pods.spec)


def _tolerates(toleration: Object, taint: Object) -> bool:
    has_key = toleration.get("key") in (None, "", taint["key"])
    has_effect = toleration.get("effect") in (None, "", taint["effect"])
    has_value = toleration.get("operator") == "Exists" or toleration.get("value", "") == taint.get("value", "")
    return has_key and has_effect and has_value


def rooms(nodes: Iterable[Object], running: Iterable[Object]) -> list[Room]:
    """The nodes that are ready, and what the pods that run there leave of them."""
    used = defaultdict[str, Counter[str]](Counter)
    for pod in running:
        used[pod["spec"].get("nodeName", "")].update(requests(pod["spec"]))
    found = []
    for node in nodes:
        spec, status = node["spec"], node["status"]
        if not spec.get("unschedulable") and {"type": "Ready", "status": "True"}.items() <= _ready(status).items():
            offered = Counter({kind: thousandths(quantity) for kind, quantity in status["allocatable"].items()})
            free = Counter({kind: amount - used[name_of(node)][kind] for kind, amount in offered.items()})
            found.append(Room(name_of(node), labels_of(node), spec.get("taints", []), offered, free))
    return found


def _ready(status: Object) -> Object:
    return next((one for one in status.get("conditions", []) if one["type"] == "Ready"), {})


def place(groups: Sequence[Pods], nodes: Sequence[Room]) -> dict[str, int]:
    """How many pods of which group find no room: the largest first, each onto the first node that has room."""
    left = [Room(node.name, node.labels, node.taints, node.offered, Counter(node.free)) for node in nodes]
    without = Counter[str]()
    for group in sorted(groups, key=_size, reverse=True):
        for _ in range(group.count):
            if node := next((node for node in left if node.takes(group)), None):
                node.free.subtract(group.requests)
            else:
                without[group.name] += 1
    return dict(without)


def _size(group: Pods) -> tuple[int, ...]:
    """Devices count first, since few nodes have them."""
    wanted = group.requests
    return sum(amount for kind, amount in wanted.items() if "/" in kind), wanted["memory"], wanted["cpu"]


def check_room(groups: Sequence[Pods], nodes: Sequence[Room], note: str) -> Iterator[Check]:
    """A line for each group of which a pod finds no room, else one; none where there are no pods.

    Args:
        note: what the figures leave out.
    """
    without = place(groups, nodes)
    for group in groups:
        if number := without.get(group.name):
            reason, fix = _why_not(group, nodes)
            pods = f"{number} of {group.count} pods {group.name} ({show(group.requests)})"
            yield Check("room", False, f"no node takes {pods}: {reason}{note}", fix)
    if groups and not without:
        free = show(sum((node.free for node in nodes), Counter()))
        num = sum(group.count for group in groups)
        yield Check("room", True, f"for all {num} pods; ready nodes: {len(nodes)}, free there: {free}{note}")


def _why_not(group: Pods, nodes: Sequence[Room]) -> tuple[str, str]:
    """The reason, and the fix."""
    labelled = [node for node in nodes if node.is_labelled_for(group.spec)]
    entered = [node for node in labelled if not node.taints_against(group.spec)]
    if not nodes:
        return "none is ready", "kubectl describe nodes says why"
    if not labelled:
        labels = " ".join(f"{key}={value}" for key, value in group.spec["nodeSelector"].items())
        fix = f"kubectl label node NODE {labels}; or name your own labels in the overlay"
        return f"none that is ready has the labels {labels}", fix
    if not entered:
        taints = name_some(sorted({taint for node in labelled for taint in node.taints_against(group.spec)}))
        return f"taints keep them off: {taints}", "give the pods a toleration in the overlay"
    most = {kind: max(node.free[kind] for node in entered) for kind in group.requests}
    absent = [kind for kind in most if not any(node.offered[kind] for node in entered)]
    short = {kind: most[kind] for kind, amount in group.requests.items() if most[kind] < amount and kind not in absent}
    reasons = [f"none that they may enter offers {name_some(absent)}"] if absent else []
    plugins = {GPU: "NVIDIA's device plugin where there are GPUs"}
    fixes = [f"install {plugins.get(kind, f'the device plugin that offers {kind}')}" for kind in absent]
    if short or not absent:
        reasons.append(f"none has more than {show(short)} free" if short else "none is left with enough of all at once")
        fixes.append("add nodes, end what runs there, or take an overlay that asks for less")
    return ", and ".join(reasons), "; ".join(fixes)


def show(amounts: Mapping[str, int]) -> str:
    """Such as 64 CPU, 256 GiB, 8 nvidia.com/gpu."""
    sizes = {"cpu": (1e3, "CPU"), "memory": (1e3 * GIB, "GiB"), "pods": (1e3, "pods")}
    kinds = [kind for kind in ("cpu", "memory") if kind in amounts] + sorted(kind for kind in amounts if "/" in kind)
    units = [(amounts[kind], *sizes.get(kind, (1e3, kind))) for kind in kinds or amounts]
    return ", ".join(f"{amount / scale:.4g} {unit}" for amount, scale, unit in units)
