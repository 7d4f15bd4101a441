"""Lines of `pipeline doctor --kubernetes` about a RayJob's command, and what a cluster has for it: KubeRay, network."""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.cluster.doctor.check_results import Check, name_some
from pipeline.cluster.doctor.kubectl import Cluster, Object
from pipeline.cluster.doctor.manifests import GPU, name_of, namespace_of, of_kind, ray_spec, rays, secrets, thousandths
from pipeline.config.schema import Config
from pipeline.errors import UserError

SHELLS = set("&;|$<>(){}*?~`'\"\\#\n")
OLDEST_KUBERAY = (1, 7)
KUBERAY_FIX = (
    "install KubeRay 1.7 or newer, and with an older one its CRDs too, which Helm does not update (docs/cluster.md)"
)
APIS = {
    "ray.io": KUBERAY_FIX,
    "kueue.x-k8s.io": "install Kueue, or take another overlay",
    "monitoring.coreos.com": "install kube-prometheus-stack, or do without k8s/monitoring",
}
ENFORCERS = "calico|canal|cilium|antrea|kube-router|weave-net|ovn|azure-npm|anetd"
FIRST_KINDNET = 20240813  # of kind 0.24, the first that enforces policies
PLUGIN_FIX = "install Calico or Cilium; without one, every pod of the cluster reaches MLflow, Postgres and Ray"


def check_command(job: Object, folder: Path, read: Callable[[list[str]], Config]) -> Check:
    """Whether a RayJob's command means something, and its workers find room in its pods.

    Args:
        read: the configuration that the words of a `pipeline train` mean; raises UserError where that would.
    """
    name, command = f"command of {name_of(job)}", job["spec"].get("entrypoint", "").strip()
    fix = "correct the entrypoint, before a cluster is made for it"
    if odd := sorted(SHELLS & {*command}):
        return Check(name, False, f"two shells read it, and change what has {' '.join(odd)} in it", fix)
    words = command.removeprefix("exec ").split()
    program, words = words[:2], words[2:]
    if program != ["pipeline", "train"] or "--resume" in words:
        is_typo = program[:1] == ["pipeline"] and "--resume" not in words
        text, fix = f"{' '.join(program)}: is no training that is known here", "write `pipeline train CONFIG ...`"
        return Check(name, False if is_typo else None, text, fix)
    keys = Counter(word.partition("=")[0] for word in words if "=" in word)
    if twice := [key for key, count in keys.items() if count > 1]:
        text = f"{name_some(twice)} twice: k8s/base/kustomization.yaml replaces words by their place"
        return Check(name, False, text, "add settings after the last word only, in `more` of k8s/base/settings.yaml")
    for place, word in enumerate(words):
        if word.endswith((".yaml", ".yml")) and "=" not in word:  # in the image as in the project's folder
            files = [base / word for base in (Path(), *folder.resolve().parents) if (base / word).is_file()]
            if not files:
                is_typo, fix = Path("configs").is_dir(), "name a file of the image; run this in the project's folder"
                return Check(name, False if is_typo else None, f"{word}: is not here", fix)
            words[place] = str(files[0])
    try:
        cfg = read(words)
    except UserError as e:
        return Check(name, False, str(e), fix)
    spec, wanted = ray_spec(job), cfg.cluster.min_workers
    if "headGroupSpec" not in spec:
        return Check(name, True, "valid; its cluster is not made by it")
    room = sum(_num_workers(group, cfg) for group in (spec["headGroupSpec"], *spec.get("workerGroupSpecs", [])))
    text = f"{'valid; ' if room >= wanted else ''}it needs {wanted} workers, and its pods hold {room}"
    fix = "let cluster.workers, and their cluster.cpus_per_worker, fit the pods' replicas, CPUs and GPUs"
    return Check(name, room >= wanted, text, fix)


def _num_workers(group: Object, cfg: Config) -> int:
    """How many find room in a group's pods, by what KubeRay tells Ray of them."""
    resources = group["template"]["spec"]["containers"][0].get("resources", {})
    has = resources.get("requests", {}) | resources.get("limits", {})
    cpus = int(group.get("rayStartParams", {}).get("num-cpus") or thousandths(has.get("cpu", 0)) // 1000)
    by_cpus, gpus = cpus // (cfg.cluster.cpus_per_worker or 1), int(has.get(GPU, 0))
    uses_gpus = cfg.cluster.device == "gpu" or (cfg.cluster.device == "auto" and gpus > 0)
    return int(group.get("replicas", 1) * (min(gpus, by_cpus) if uses_gpus else by_cpus))


def check_apis(objects: Sequence[Object], versions: set[str]) -> Check:
    """Whether the API server has all kinds of objects, some of which operators bring."""
    lacking = sorted({one["apiVersion"] for one in objects} - versions)
    groups = dict.fromkeys(one.partition("/")[0] for one in lacking)
    others = sorted(one for one in versions if one.partition("/")[0] in groups)
    text = f"{name_some(lacking)} missing" + (f", though {name_some(others)} is there" if others else "")
    fix = "; ".join(APIS.get(group, f"install what serves {group}") for group in groups)
    return Check("APIs", not lacking, text if lacking else "all that the manifests need are there", fix)


def check_crds(objects: Sequence[Object], cluster: Cluster) -> Iterator[Check]:
    """Whether KubeRay's CRDs have all fields that the manifests use: others are refused or dropped."""
    schemas = {
        (crd["spec"]["names"]["kind"], f"{crd['spec']['group']}/{version['name']}"): version["schema"]
        for crd in cluster("crds")
        for version in crd["spec"]["versions"]
        if version["served"]
    }
    for one in rays(objects):
        if schema := schemas.get((one["kind"], one["apiVersion"])):  # else it is among the APIs that are missing
            spec = schema["openAPIV3Schema"]["properties"]["spec"]
            unknown = list(dict.fromkeys(_unknown_fields(one["spec"], spec, "spec")))
            text = f"does not know {name_some(unknown)}" if unknown else "knows all fields of the manifests"
            yield Check(f"CRD of {one['kind']}", not unknown, text, KUBERAY_FIX)


def _unknown_fields(value: Any, schema: Mapping[str, Any], path: str) -> Iterator[str]:
    if isinstance(value, list):
        for one in value:
            yield from _unknown_fields(one, schema.get("items", {}), f"{path}[]")
    elif isinstance(value, dict) and "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        for key, inner in value.items():
            if key in schema["properties"]:
                yield from _unknown_fields(inner, schema["properties"][key], f"{path}.{key}")
            else:
                yield f"{path}.{key}"


def check_operator(objects: Sequence[Object], cluster: Cluster) -> Iterator[Check]:
    """Whether KubeRay's operator runs, looks at the namespace, and is new enough."""
    if rays(objects):
        yield _check_operator(cluster, namespace_of(objects))


def _check_operator(cluster: Cluster, namespace: str) -> Check:
    operators = [*cluster("operators of Helm"), *cluster("operators of kustomize")]
    if not operators:
        return Check("KubeRay", False, "there is no operator, so nobody looks at a RayJob", KUBERAY_FIX)
    operator, container = operators[0], operators[0]["spec"]["template"]["spec"]["containers"][0]
    text = f"{container['image']} in {operator['metadata']['namespace']}"
    if not operator["status"].get("readyReplicas"):
        fix = f"kubectl -n {operator['metadata']['namespace']} logs deployment/{name_of(operator)} says why"
        return Check("KubeRay", False, f"{text} is not ready", fix)
    watched = re.search(r"--watch-namespace[= ]([\w,-]+)", " ".join(container.get("args", [])))
    if watched and namespace not in watched[1].split(","):
        fix = f"add {namespace} to watchNamespace in its Helm values"
        return Check("KubeRay", False, f"{text} looks at the namespaces {watched[1]}, not at {namespace}", fix)
    tag = re.search(r":v?(\d+)\.(\d+)[^/]*$", container["image"])
    if not tag:
        return Check("KubeRay", None, f"{text} is ready; its tag says no version", KUBERAY_FIX)
    is_new = (int(tag[1]), int(tag[2])) >= OLDEST_KUBERAY
    return Check("KubeRay", is_new, f"{text} is {'ready' if is_new else 'too old'}", KUBERAY_FIX)


def check_secrets(objects: Sequence[Object], cluster: Cluster) -> Iterator[Check]:
    """Whether the Secrets are there that pods wait for and nothing makes."""
    readers = secrets(objects)
    if not readers:
        yield Check("Secrets", True, "all that pods wait for are made by the manifests")
        return
    there = {word.partition("/")[2] for word in cluster("secrets")}
    lacking = [f"{name}, which {name_some(pods)} read" for name, pods in readers.items() if name not in there]
    text = f"missing: {name_some(lacking)}" if lacking else f"{name_some(readers)} there"
    fix = f"kubectl -n {namespace_of(objects)} create secret generic ... (docs/cluster.md, Secrets)"
    yield Check("Secrets", not lacking, text, fix)


def check_policies(objects: Sequence[Object], cluster: Cluster) -> Iterator[Check]:
    """Whether a network plugin enforces NetworkPolicies, where there are any."""
    if of_kind(objects, "NetworkPolicy"):
        yield Check("network policies", *_enforced(cluster))


def _enforced(cluster: Cluster) -> tuple[bool | None, str, str]:
    """Whether they are, by what, and what to do otherwise."""
    containers = {name_of(one): one["spec"]["template"]["spec"]["containers"] for one in cluster("daemonsets")}
    if found := [name for name in containers if re.search(ENFORCERS, name)]:
        return True, f"enforced by {name_some(found)}", ""
    if any("+k3s" in node["status"]["nodeInfo"]["kubeletVersion"] for node in cluster("nodes")):
        return True, "enforced by k3s itself, unless it runs with --disable-network-policy", ""
    for name, inner in containers.items():
        if date := re.search(r"kindnetd:v(\d{8})", inner[0]["image"]):
            text = f"kindnet of {date[1]}; since {FIRST_KINDNET} (kind 0.24) it enforces them"
            return int(date[1]) >= FIRST_KINDNET, text, PLUGIN_FIX
        if name == "aws-node":
            is_on = any("--enable-network-policy=true" in one.get("args", []) for one in inner)
            return is_on, f"aws-node has them turned {'on' if is_on else 'off'}", "turn them on in the VPC CNI add-on"
        if "flannel" in name:
            return False, f"{name} ignores them silently", PLUGIN_FIX
    return None, "no network plugin that is known here; some ignore them silently", "ask who runs the cluster"
