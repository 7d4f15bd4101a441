"""`pipeline doctor --kubernetes`: what a cluster lacks for manifests, before they are applied, and why they are stuck.

`kubectl` asks, `manifests` says what is wanted; the other modules that this one imports make lines of it.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from pipeline.cluster.doctor import check_kubernetes, check_volumes, kubectl, manifests, placement, stuck
from pipeline.cluster.doctor.check_results import Check
from pipeline.cluster.doctor.kubectl import Cluster, NotKnownError, Object
from pipeline.config.schema import Config

IMMUTABLE = re.compile("immutable|updates to statefulset spec")
IMMUTABLE_FIX = "another variant was applied before: take it away first (docs/cluster.md, Take it away)"


def examine(folder: Path, read_command: Callable[[list[str]], Config]) -> list[Check]:
    """All checks of a folder of manifests, on the cluster that kubectl is set to.

    Args:
        read_command: as of `check_command`.

    Raises:
        UserError: the manifests cannot be read, or the cluster cannot be reached.
    """
    objects = kubectl.render(folder)
    versions, namespace = kubectl.api_versions(), manifests.namespace_of(objects)
    cluster = kubectl.ask(_questions(namespace, versions))
    checks = [Check("cluster", True, f"{kubectl.context() or 'of this pod'}, namespace {namespace}")]
    jobs = manifests.of_kind(objects, "RayJob")
    checks += [check_kubernetes.check_command(job, folder, read_command) for job in jobs]
    checks.append(check_kubernetes.check_apis(objects, versions))
    parts: dict[str, Iterable[Check]] = {
        "KubeRay": check_kubernetes.check_operator(objects, cluster),
        "CRDs": check_kubernetes.check_crds(objects, cluster),
        "claims": check_volumes.check_claims(objects, cluster),
        "room": _check_room(objects, cluster, namespace),
        "network policies": check_kubernetes.check_policies(objects, cluster),
        "Secrets": check_kubernetes.check_secrets(objects, cluster),
        "apply": _check_apply(objects, cluster, namespace, versions),
        "RayJob": stuck.check_running(cluster, namespace),
    }
    for name, part in parts.items():
        try:
            for check in part:
                checks.append(check)  # what came before an answer that is lacking stays
        except NotKnownError as e:
            checks.append(Check(name, None, f"not known: {e}", "have somebody run this who may read that"))
    return checks


def _questions(namespace: str, versions: set[str]) -> dict[str, list[str]]:
    here, label = ["-n", namespace], "app.kubernetes.io"
    rays = {kind: [kind, *here] for kind in ("rayjobs", "rayclusters") if "ray.io/v1" in versions}
    return rays | {
        "crds": ["crd", "rayjobs.ray.io", "rayclusters.ray.io", "--ignore-not-found"],
        "operators of Helm": ["deployments", "-A", "-l", f"{label}/name=kuberay-operator"],
        "operators of kustomize": ["deployments", "-A", "-l", f"{label}/component=kuberay-operator"],
        "nodes": ["nodes"],
        "running": ["pods", "-A", "--field-selector=status.phase!=Succeeded,status.phase!=Failed"],
        "daemonsets": ["daemonsets", "-A"],
        "classes": ["storageclasses"],
        "volumes": ["persistentvolumes"],
        "namespace": ["namespace", namespace, "--ignore-not-found"],
        "claims": ["persistentvolumeclaims", *here],
        "pods": ["pods", *here],
        "warnings": ["events", *here, "--field-selector=type=Warning"],
        "secrets": ["secrets", *here, "-o=name"],  # what is in them stays with kubectl
    }


def _check_room(objects: Sequence[Object], cluster: Cluster, namespace: str) -> Iterator[Check]:
    groups, rays = list(manifests.pods(objects)), manifests.rays(objects)
    if any(stuck.QUEUE in manifests.labels_of(one) for one in rays):
        running = [one for one in cluster("running") if _stays(one)]
        note = " (beside pods that never end, since Kueue waits for others; its quotas are not looked at)"
    else:
        names = {manifests.name_of(one) for one in rays}
        jobs = [one for one in cluster("rayjobs") if manifests.name_of(one) in names]
        names |= {one.get("status", {}).get("rayClusterName") for one in jobs}
        running, note = [one for one in cluster("running") if not _is_ours(one, groups, names, namespace)], ""
    yield from placement.check_room(groups, placement.rooms(cluster("nodes"), running), note)


def _stays(pod: Object) -> bool:
    """Whether it is one of the cluster's own, which run on a node for as long as that is there."""
    owners = {owner["kind"] for owner in pod["metadata"].get("ownerReferences", [])}
    return pod["metadata"]["namespace"] == "kube-system" or not owners.isdisjoint({"DaemonSet", "Node"})


def _is_ours(pod: Object, groups: Sequence[manifests.Pods], ray_clusters: set[str], namespace: str) -> bool:
    """Whether it is one that the manifests ask for, from an apply before: it has its room already."""
    labels = manifests.labels_of(pod)
    is_alike = any(group.labels and group.labels.items() <= labels.items() for group in groups)
    is_of_ray = "ray.io/cluster" not in labels or labels["ray.io/cluster"] in ray_clusters
    return pod["metadata"]["namespace"] == namespace and is_alike and is_of_ray


def _check_apply(objects: Sequence[Object], cluster: Cluster, namespace: str, versions: set[str]) -> Iterator[Check]:
    """What the API server would refuse; above all, to change what cannot be changed."""
    if not cluster("namespace"):
        is_made = any(manifests.name_of(one) == namespace for one in manifests.of_kind(objects, "Namespace"))
        text = f"the namespace {namespace} is not there yet{', so nothing is in the way' if is_made else ''}"
        yield Check("apply", is_made, text, f"kubectl create namespace {namespace}")
        return
    wanted, claims = manifests.claims(objects), {manifests.name_of(one): one for one in cluster("claims")}
    told = [name for name in wanted.keys() & claims if check_volumes.difference(claims[name], wanted[name])]
    tried = [
        one
        for one in objects
        if one["apiVersion"] in versions
        and not (one["kind"] == "PersistentVolumeClaim" and manifests.name_of(one) in told)
    ]
    refusals = kubectl.dry_run(tried)
    fix = "the API server says so (kubectl apply --dry-run=server): correct the manifests, or ask for the right"
    for line in refusals:
        yield Check("apply", False, line, IMMUTABLE_FIX if IMMUTABLE.search(line) else fix)
    if not refusals:
        yield Check("apply", True, f"the API server takes {len(tried)} of {len(objects)} objects (dry run)")
