"""The manifests of k8s/ as objects, for tests; `kubectl kustomize` renders the overlays, and asks no API server."""

import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import ROOT

from pipeline.cluster.doctor.manifests import thousandths

K8S = ROOT / "k8s"
VARIANTS = ["base", *(f"overlays/{path.name}" for path in sorted((K8S / "overlays").iterdir()))]
Object = dict[str, Any]


def kustomize(folder: Path) -> list[Object]:
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl, which renders the overlays, is not here")
    text = subprocess.run(["kubectl", "kustomize", folder], check=True, capture_output=True, text=True).stdout
    return list(yaml.safe_load_all(text))


@cache
def rendered(variant: str) -> list[Object]:
    return kustomize(K8S / variant)


def of_kind(objects: list[Object], *kinds: str) -> list[Object]:
    return [one for one in objects if one["kind"] in kinds]


def identity(one: Object) -> tuple[str, str]:
    return one["kind"], one["metadata"]["name"]


def ray_specs(objects: list[Object]) -> Iterator[Object]:
    for one in of_kind(objects, "RayJob", "RayCluster"):
        yield one["spec"].get("rayClusterSpec", one["spec"])


def pods(objects: list[Object]) -> Iterator[tuple[int, Object]]:
    """Each pod's template with the number of such pods."""
    for one in of_kind(objects, "Deployment", "StatefulSet"):
        yield one["spec"]["replicas"], one["spec"]["template"]
    for spec in ray_specs(objects):
        yield 1, spec["headGroupSpec"]["template"]
        for group in spec["workerGroupSpecs"]:
            yield group["replicas"], group["template"]
    for job in of_kind(objects, "RayJob"):
        yield 1, job["spec"]["submitterPodTemplate"]
    for job in of_kind(objects, "Job"):
        yield 1, job["spec"]["template"]


def component(template: Object) -> str:
    return str(template["metadata"]["labels"]["app.kubernetes.io/component"])


def containers(template: Object) -> list[Object]:
    return [*template["spec"].get("initContainers", []), *template["spec"]["containers"]]


def amount(quantity: str) -> float:
    """A quantity of Kubernetes: CPUs, or bytes."""
    return thousandths(quantity) / 1000
