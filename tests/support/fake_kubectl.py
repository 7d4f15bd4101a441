"""A `kubectl` of a made-up cluster: it answers from files, and leaves `kustomize` to the real one."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from manifests import Object

SCRIPT = """#!/bin/sh
case "$1" in --request-timeout=*) shift ;; esac
case "$1" in
kustomize) exec {real} "$@" ;;
apply) cat >{folder}/applied.json; name=apply ;;
get) name="$2" ;;
*) name="$1" ;;
esac
case " $* " in *" -A "*) name="$name-everywhere" ;; esac
case " $* " in *component=kuberay*) name="$name-by-component" ;; esac
if [ -f {folder}/$name.err ]; then cat {folder}/$name.err >&2; exit 1; fi
if [ -f {folder}/$name ]; then exec cat {folder}/$name; fi
case " $* " in *" -o=json "*) echo '{{"items": []}}' ;; esac
"""


class FakeKubectl:
    """The folder that a PATH needs to begin with, and the cluster behind it."""

    def __init__(self, folder: Path):
        self._folder = folder / "cluster"
        self._folder.mkdir()
        self.bin = folder / "bin"
        self.bin.mkdir()
        script = self.bin / "kubectl"
        script.write_text(SCRIPT.format(real=shutil.which("kubectl") or "false", folder=self._folder))
        script.chmod(0o755)
        self.path = os.pathsep.join([str(self.bin), os.environ["PATH"]])

    def has(self, name: str, *items: Object) -> None:
        """What `kubectl get NAME` finds; with -A it is NAME-everywhere."""
        self.says(name, json.dumps({"items": items}))

    def says(self, name: str, text: str) -> None:
        (self._folder / name).write_text(text)

    def refuses(self, name: str, error: str) -> None:
        (self._folder / f"{name}.err").write_text(error)

    @property
    def applied(self) -> list[Object]:
        """What the dry run was given."""
        return list(map(json.loads, (self._folder / "applied.json").read_text().splitlines()))


def write(folder: Path, objects: list[Object]) -> Path:
    """A folder of manifests, as `kubectl apply -f` reads it."""
    folder.mkdir()
    (folder / "all.yaml").write_text("\n---\n".join(map(json.dumps, objects)))  # JSON is YAML, and written faster
    return folder


def meta(name: str, namespace: str = "pipeline", **more: Any) -> Object:
    return {
        "name": name,
        "namespace": namespace,
        "uid": f"uid-of-{name}",
        "creationTimestamp": "2026-01-01T00:00:00Z",
        **more,
    }


def node(name: str, *, version: str = "v1.33.1", labels: dict[str, str] | None = None, **allocatable: str) -> Object:
    """allocatable: cpu, memory, gpu."""
    offered = {"pods": "110", **{{"gpu": "nvidia.com/gpu"}.get(key, key): value for key, value in allocatable.items()}}
    return {
        "kind": "Node",
        "metadata": {"name": name, "labels": {"kubernetes.io/hostname": name, **(labels or {})}},
        "spec": {},
        "status": {
            "allocatable": offered,
            "conditions": [{"type": "MemoryPressure", "status": "False"}, {"type": "Ready", "status": "True"}],
            "nodeInfo": {"kubeletVersion": version},
        },
    }


def pod(
    name: str, namespace: str = "kube-system", *, on: str = "", labels: dict[str, str] | None = None, **requests: str
) -> Object:
    container = {"name": "main", "image": "some", "resources": {"requests": requests}}
    spec: Object = {"containers": [container]} | ({"nodeName": on} if on else {})
    return {"metadata": meta(name, namespace, labels=labels or {}), "spec": spec, "status": {"phase": "Running"}}


def storage_class(name: str, provisioner: str, *, default: bool = True) -> Object:
    annotations = {"storageclass.kubernetes.io/is-default-class": "true"} if default else {}
    metadata = {"name": name, "annotations": annotations, "creationTimestamp": "2026-01-01T00:00:00Z"}
    return {"kind": "StorageClass", "metadata": metadata, "provisioner": provisioner}


def daemonset(name: str, image: str, *args: str) -> Object:
    container = {"name": name, "image": image, "args": list(args)}
    return {"metadata": meta(name, "kube-system"), "spec": {"template": {"spec": {"containers": [container]}}}}


def operator(image: str = "quay.io/kuberay/operator:v1.7.0", *args: str, ready: int = 1) -> Object:
    container = {"name": "kuberay-operator", "image": image, "command": ["/manager"], "args": list(args)}
    return {
        "metadata": meta("kuberay-operator", "kuberay-system"),
        "spec": {"template": {"spec": {"containers": [container]}}},
        "status": {"readyReplicas": ready} if ready else {},
    }


def claim(
    name: str, phase: str = "Bound", mode: str = "ReadWriteOnce", size: str = "5Gi", storage_class: str = "standard"
) -> Object:
    resources = {"requests": {"storage": size}}
    spec = {"accessModes": [mode], "resources": resources, "storageClassName": storage_class}
    return {"metadata": meta(name), "spec": spec, "status": {"phase": phase}}


def warning(of: Object, reason: str, message: str, at: str = "2026-01-01T00:00:00Z") -> Object:
    involved = {"uid": of["metadata"]["uid"], "name": of["metadata"]["name"]}
    return {"involvedObject": involved, "reason": reason, "message": message, "lastTimestamp": at, "type": "Warning"}


def container_state(name: str, *, waiting: Object | None = None, ended: Object | None = None) -> Object:
    """The status of a pod of one container."""
    state = {"waiting": waiting} if waiting else {"running": {}}
    return {"containerStatuses": [{"name": name, "state": state, "lastState": {"terminated": ended} if ended else {}}]}
