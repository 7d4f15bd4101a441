"""What manifests ask a cluster for: pods with their sizes, claims, Secrets."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from ray.autoscaler._private.kuberay import utils  # what Kubernetes' own client parses quantities by

from pipeline.cluster.doctor.kubectl import Object

GPU = "nvidia.com/gpu"
# KubeRay has a worker wait for the head in an init container that asks for this much.
WAITS_FOR_HEAD = {"resources": {"requests": {"cpu": "200m", "memory": "256Mi"}}}


@dataclass(frozen=True)
class Pods:
    """Pods that are alike. name: such as resnet152/gpu; requests: of each, as of `requests`."""

    name: str
    count: int
    spec: Object
    labels: dict[str, str]
    requests: "Counter[str]" = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "requests", requests(self.spec))


def thousandths(quantity: Any) -> int:
    """A quantity of Kubernetes, such as 200m or 64Gi: a whole number, so that what fits exactly fits."""
    return int(utils.parse_quantity(quantity) * 1000)


def requests(spec: Object) -> "Counter[str]":
    """What the scheduler counts for a pod: the sum of its containers, or its largest init container where that is more.

    In thousandths of CPUs, bytes and devices.
    """
    total, first = Counter(pods=1000), Counter[str]()
    for container in spec["containers"]:
        total += _asked(container)
    for container in spec.get("initContainers") or []:
        if container.get("restartPolicy") == "Always":  # it runs beside the others
            total += _asked(container)
        else:
            first |= _asked(container)
    return total | first


def _asked(container: Object) -> "Counter[str]":
    resources = container.get("resources") or {}
    asked = (resources.get("limits") or {}) | (resources.get("requests") or {})
    return Counter({kind: thousandths(quantity) for kind, quantity in asked.items()})


def of_kind(objects: Sequence[Object], *kinds: str) -> list[Object]:
    return [one for one in objects if one["kind"] in kinds]


def rays(objects: Sequence[Object]) -> list[Object]:
    return of_kind(objects, "RayJob", "RayCluster")


def name_of(one: Object) -> str:
    return str(one["metadata"].get("name") or one["metadata"]["generateName"])


def labels_of(one: Object) -> dict[str, str]:
    return dict(one.get("metadata", {}).get("labels") or {})


def namespace_of(objects: Sequence[Object]) -> str:
    """Where the pods will be."""
    return str(next((one["metadata"]["namespace"] for one in objects if "namespace" in one["metadata"]), "default"))


def ray_spec(one: Object) -> Object:
    """The cluster's, of a RayJob or a RayCluster."""
    return dict(one["spec"].get("rayClusterSpec") or one["spec"])


def pods(objects: Sequence[Object]) -> Iterator[Pods]:
    """All pods, as if they ran at once."""
    for one in of_kind(objects, "Deployment", "StatefulSet", "Job"):
        template = one["spec"]["template"]
        yield Pods(name_of(one), one["spec"].get("replicas", 1), template["spec"], labels_of(template))
    for one in rays(objects):
        name = name_of(one)
        if head := ray_spec(one).get("headGroupSpec", {}).get("template"):  # else a cluster that is there is taken
            yield Pods(f"{name}/head", 1, head["spec"], labels_of(head))
        for group in ray_spec(one).get("workerGroupSpecs", []):
            spec = group["template"]["spec"]
            spec = spec | {"initContainers": [*(spec.get("initContainers") or []), WAITS_FOR_HEAD]}
            yield Pods(f"{name}/{group['groupName']}", group.get("replicas", 1), spec, labels_of(group["template"]))
        if template := one["spec"].get("submitterPodTemplate"):
            yield Pods(f"{name}/submitter", 1, template["spec"], labels_of(template))


def claims(objects: Sequence[Object]) -> dict[str, Object]:
    """The specs of all claims by their names, also of those that StatefulSets make."""
    found = {name_of(one): one["spec"] for one in of_kind(objects, "PersistentVolumeClaim")}
    for one in of_kind(objects, "StatefulSet"):
        for template in one["spec"].get("volumeClaimTemplates", []):
            for number in range(one["spec"].get("replicas", 1)):
                found[f"{name_of(template)}-{name_of(one)}-{number}"] = template["spec"]
    return found


def secrets(objects: Sequence[Object]) -> dict[str, list[str]]:
    """The Secrets that pods wait for -> these pods, without those that are made: Jobs name them in their commands."""
    readers = defaultdict[str, list[str]](list)
    for group in pods(objects):
        for name in dict.fromkeys(_secrets_of(group.spec)):
            readers[name].append(group.name)
    jobs = [one for job in of_kind(objects, "Job") for one in job["spec"]["template"]["spec"]["containers"]]
    made = {word for one in jobs for word in (*one.get("command", []), *one.get("args", []))}
    made |= {name_of(one) for one in of_kind(objects, "Secret")}
    return {name: pods for name, pods in readers.items() if name not in made}


def _secrets_of(spec: Object) -> Iterator[str]:
    containers = [*spec["containers"], *(spec.get("initContainers") or [])]
    sources = [source.get("secretRef") for one in containers for source in one.get("envFrom", [])]
    sources += [env.get("valueFrom", {}).get("secretKeyRef") for one in containers for env in one.get("env", [])]
    sources += [volume.get("secret") for volume in spec.get("volumes", [])] + spec.get("imagePullSecrets", [])
    for source in sources:
        if source and not source.get("optional"):
            yield source.get("name") or source["secretName"]
