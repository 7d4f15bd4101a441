"""`pipeline doctor --kubernetes` on made-up clusters: what it says of each lack, and no more."""

import itertools
import json
import random
import re
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import ROOT, Run
from fake_kubectl import (
    FakeKubectl,
    claim,
    container_state,
    daemonset,
    meta,
    node,
    operator,
    pod,
    storage_class,
    warning,
    write,
)
from manifests import VARIANTS, Object, of_kind, rendered

from pipeline.cluster.doctor import manifests
from pipeline.cluster.doctor.check_kubernetes import check_operator, check_policies
from pipeline.cluster.doctor.manifests import Pods, requests, thousandths
from pipeline.cluster.doctor.placement import Room, check_room, place, rooms

CRDS = ROOT.parent / "shared" / "kuberay-crds"
BUILT_IN = "v1 apps/v1 batch/v1 networking.k8s.io/v1 policy/v1 rbac.authorization.k8s.io/v1 storage.k8s.io/v1"
DEMO = "overlays/cpu-demo"
KIND_RWX = (
    'failed to provision volume with StorageClass "standard": NodePath only supports ReadWriteOnce and '
    "ReadWriteOncePod (1.22+) access modes"
)
THERE = json.dumps({"kind": "Namespace", "metadata": {"name": "pipeline"}})
Doctor = Callable[..., str]


@cache
def crds() -> tuple[Object, ...]:
    """KubeRay 1.7's, as an API server returns them; without descriptions."""
    if not CRDS.is_dir():
        return ()
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    found = [yaml.load(file.read_text(), loader) for file in sorted(CRDS.glob("*.yaml"))]
    for crd in found:
        crd["spec"]["versions"] = [one for one in crd["spec"]["versions"] if one["name"] == "v1"]
    return tuple(found)


@cache
def crds_as_json() -> str:
    return json.dumps({"items": crds()})


@pytest.fixture
def kubectl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeKubectl:
    """kind with one node, where nothing was installed: what `kind create cluster` makes on a laptop."""
    fake = FakeKubectl(tmp_path)
    monkeypatch.setenv("PATH", fake.path)
    monkeypatch.chdir(ROOT)
    fake.says("config", "kind-pipeline\n")
    fake.says("api-versions", BUILT_IN)
    fake.has("nodes", node("pipeline-control-plane", cpu="8", memory="16Gi"))
    fake.has("pods-everywhere", pod("coredns", on="pipeline-control-plane", cpu="100m", memory="70Mi"))
    fake.has("storageclasses", storage_class("standard", "rancher.io/local-path"))
    fake.has("daemonsets-everywhere", daemonset("kindnet", "docker.io/kindest/kindnetd:v20250512-df8de77b"))
    return fake


@pytest.fixture
def kind(kubectl: FakeKubectl) -> FakeKubectl:
    """The same with KubeRay."""
    kubectl.says("api-versions", f"{BUILT_IN} ray.io/v1")
    kubectl.says("crd", crds_as_json())
    kubectl.has("deployments-everywhere", operator())
    kubectl.has("deployments-everywhere-by-component", operator())
    return kubectl


@pytest.fixture
def gpus(kind: FakeKubectl) -> FakeKubectl:
    """Two nodes of 8 GPUs and one for the rest, with Calico and an NFS class."""
    names = ("cpu-1", "gpu-1", "gpu-2")
    nodes = [node(name, cpu="127", memory="1000Gi", gpu="8" if name.startswith("gpu") else "0") for name in names]
    for one in nodes[1:]:
        one["spec"]["taints"] = [{"key": "nvidia.com/gpu", "value": "present", "effect": "NoSchedule"}]
    kind.says("config", "a100\n")
    kind.has("nodes", *nodes)
    kind.has("pods-everywhere", *(pod(f"calico-{name}", on=name, cpu="250m") for name in names))
    kind.has("storageclasses", storage_class("nfs", "nfs.csi.k8s.io"))
    kind.has("daemonsets-everywhere", daemonset("calico-node", "calico/node:v3.29.0"))
    return kind


@pytest.fixture
def doctor(run: Run, tmp_path: Path) -> Doctor:
    """The lines about a variant of k8s/, or about given objects; as of the exit code, one of them is bad."""
    numbers = itertools.count()

    def lines(what: str | list[Object] = "base", *, bad: bool = False) -> str:
        objects = rendered(what) if isinstance(what, str) else what
        status, out, err = run("doctor", "--kubernetes", write(tmp_path / f"manifests-{next(numbers)}", objects))
        assert status == bad, out + err
        return out

    return lines


def line(out: str, start: str) -> str:
    """The one line that begins with these words."""
    found = [one for one in out.splitlines() if one.startswith(start)]
    assert len(found) == 1, f"{start!r} in\n{out}"
    return found[0]


def without_job(variant: str) -> list[Object]:
    return [one for one in rendered(variant) if one["kind"] != "RayJob"]


def claims_alone() -> list[Object]:
    return deepcopy(of_kind(rendered("base"), "Namespace", "PersistentVolumeClaim"))


def test_a_cluster_that_has_all_is_ok(gpus: FakeKubectl, run: Run) -> None:
    """Of the default folder, rendered by the real kubectl."""
    assert rendered("base"), "skips where there is none"
    status, out, _ = run("doctor", "--kubernetes")
    assert status == 0, out
    assert {one[:4] for one in out.splitlines()} == {"ok  "}
    for expected in (
        "ok  cluster: a100, namespace pipeline",
        "ok  command of resnet152: valid; it needs 16 workers, and its pods hold 16",
        "ok  KubeRay: quay.io/kuberay/operator:v1.7.0 in kuberay-system is ready",
        "ok  claim data: ReadWriteMany of class nfs (nfs.csi.k8s.io)",
        "ok  claim postgres-postgres-0: ReadWriteOnce of class nfs (nfs.csi.k8s.io)",
        "ok  network policies: enforced by calico-node",
        "ok  Secrets: ",
        "ok  apply: the namespace pipeline is not there yet, so nothing is in the way",
        "ok  RayJob: none in the namespace pipeline",
    ):
        line(out, expected)
    assert "; ready nodes: 3, free there: 380.2 CPU, 3000 GiB, 16 nvidia.com/gpu" in line(out, "ok  room: for all ")


def test_json_has_each_check(gpus: FakeKubectl, run: Run, tmp_path: Path) -> None:
    gpus.refuses("storageclasses", "Error from server (Forbidden): storageclasses is forbidden")
    folder = write(tmp_path / "manifests", rendered("base"))
    status, out, _ = run("doctor", "--kubernetes", folder, "--json")
    result = json.loads(out)
    assert (status, result["status"]) == (0, "not known")
    by_name = {one["name"]: one for one in result["checks"]}
    assert (by_name["room"]["ok"], by_name["claims"]["ok"]) == (True, None)
    gpus.has("nodes")
    status, out, _ = run("doctor", "--kubernetes", folder, "--json")
    assert (status, json.loads(out)["status"]) == (1, "bad")


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_variant_is_understood(variant: str, kind: FakeKubectl, doctor: Doctor) -> None:
    out = doctor(variant, bad=variant != DEMO)
    assert "\n?  " not in out, "all is known of kind"
    if variant == DEMO:
        assert "; ready nodes: 1, free there: 7.9 CPU, 15.93 GiB" in line(out, "ok  room: for all ")


def test_kind_as_it_is_made(kubectl: FakeKubectl, doctor: Doctor) -> None:
    out = doctor(bad=True)
    assert line(out, "bad APIs: ray.io/v1 missing; install KubeRay 1.7 or newer")
    assert line(out, "bad KubeRay: there is no operator, so nobody looks at a RayJob; install KubeRay 1.7")
    for name in ("data", "storage"):
        text = line(out, f"bad claim {name}: ReadWriteMany of class standard (rancher.io/local-path), which has none")
        assert "it would wait for ever; name a class that has it (NFS, CephFS" in text
    assert line(out, "ok  claim mlflow: ReadWriteOnce of class standard")
    text = line(out, "bad room: no node takes 2 of 2 pods resnet152/gpu (64 CPU, 256 GiB, 8 nvidia.com/gpu): ")
    assert (
        "none that they may enter offers nvidia.com/gpu, and none has more than 7.9 CPU, 15.93 GiB free; install"
        in text
    )
    assert line(out, "ok  network policies: kindnet of 20250512; since 20240813 (kind 0.24) it enforces them")


def test_network_plugins() -> None:
    for version, plugin, expected in (
        (
            "v1.29.2",
            daemonset("kindnet", "kindest/kindnetd:v20240202-8f1494ea"),
            "bad network policies: kindnet of 2024",
        ),
        (
            "v1.33.1",
            daemonset("kube-flannel-ds", "flannel/flannel:v0.26"),
            "bad network policies: kube-flannel-ds ignor",
        ),
        ("v1.33.1+k3s1", daemonset("svclb-traefik", "rancher/klipper"), "ok  network policies: enforced by k3s itself"),
        ("v1.33.1-eks", daemonset("aws-node", "cni:v1.19"), "bad network policies: aws-node has them turned off"),
        (
            "v1.33.1-eks",
            daemonset("aws-node", "cni", "--enable-network-policy=true"),
            "ok  network policies: aws-node has them turned on",
        ),
        ("v1.33.1-gke", daemonset("anetd", "cilium"), "ok  network policies: enforced by anetd"),
        ("v1.33.1", daemonset("something", "own"), "?   network policies: no network plugin that is known here"),
    ):
        answers = {"daemonsets": [plugin], "nodes": [node("one", version=version)]}
        [check] = check_policies(rendered("base"), answers.__getitem__)
        assert str(check).startswith(expected)
    assert list(check_policies(claims_alone(), answers.__getitem__)) == [], "there are no policies"


def test_what_may_not_be_read_is_not_known_and_not_ok(gpus: FakeKubectl, doctor: Doctor) -> None:
    error = 'Error from server (Forbidden): {0} is forbidden: User "ann" cannot list resource "{0}" in API group ""\n'
    gpus.refuses("nodes", error.format("nodes"))
    gpus.refuses("pods-everywhere", error.format("pods"))
    gpus.refuses("crd", "Error from server (Forbidden): crds is forbidden")
    out = doctor()
    assert line(out, '?   room: not known: pods is forbidden: User "ann" cannot list resource "pods"')
    assert line(out, "?   CRDs: not known: crds is forbidden; have somebody run this who may read that")
    assert line(out, "ok  claim data: "), "the other checks go on"
    assert line(out, "ok  RayJob: ")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (
            "E1201 memcache.go:265] couldn't get current server API group list\nThe connection to the server "
            "localhost:8080 was refused - did you specify the right host or port?\n",
            "The connection to the server localhost:8080 was refused - did you specify the right host or port?; start "
            "the cluster, or choose another: `kubectl config get-contexts` lists them",
        ),
        (
            "error: You must be logged in to the server (Unauthorized)\n",
            "You must be logged in to the server (Unauthorized); log in to the cluster again",
        ),
    ],
)
def test_a_cluster_that_is_not_reached(
    error: str, expected: str, kubectl: FakeKubectl, run: Run, tmp_path: Path
) -> None:
    kubectl.refuses("api-versions", error)
    folder = write(tmp_path / "manifests", rendered("base"))
    told = f"pipeline: kubectl does not reach the cluster: {expected}\n"
    assert run("doctor", "--kubernetes", folder) == (2, "", told)


def test_a_request_that_means_nothing(
    kubectl: FakeKubectl, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def error(*words: object) -> str:
        status, out, err = run("doctor", "--kubernetes", *words)
        assert (status, out) == (2, "")
        return err

    folder = write(tmp_path / "manifests", rendered("base"))
    assert "elsewhere: is no folder of manifests; name one, such as k8s/base" in error("elsewhere")
    assert "a=b: --kubernetes takes a folder alone" in error("k8s/base", "a=b")
    (tmp_path / "broken.yaml").write_text("a: [")
    assert f"{tmp_path}: has a file that is no YAML: while parsing" in error(tmp_path)
    (tmp_path / "kustomization.yaml").write_text("resources: [none.yaml]")
    assert f"{tmp_path}: kubectl kustomize cannot read it: " in error(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "kubectl is not here; install it: https://kubernetes.io" in error(folder)


# The command


def with_command(change: Callable[[str], str]) -> list[Object]:
    objects = deepcopy(rendered(DEMO))
    [job] = of_kind(objects, "RayJob")
    job["spec"]["entrypoint"] = change(job["spec"]["entrypoint"])
    return objects


@pytest.mark.parametrize("setting", ["optim.lrr=1", "train.epochs=many"])
def test_a_wrong_setting_is_told_in_the_line_of_train(
    setting: str, kind: FakeKubectl, doctor: Doctor, run: Run
) -> None:
    objects = with_command(lambda command: f"{command} {setting}")
    [job] = of_kind(objects, "RayJob")
    told = run(*job["spec"]["entrypoint"].split()[2:])[2].strip().removeprefix("pipeline: ")
    assert setting.partition("=")[0] in told
    fix = "correct the entrypoint, before a cluster is made for it"
    assert line(doctor(objects, bad=True), "bad command of digits: ") == f"bad command of digits: {told}; {fix}"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda text: f"{text} data.cache_dir=/{{0,1}}", "bad {}: two shells read it, and change what has {{ }} in it"),
        (lambda text: text.replace("/storage/runs", "runs"), "bad {}: run.storage=runs: means nothing on a cluster"),
        (lambda text: f"{text} --resum=x", "bad {}: Unknown option"),
        (lambda text: text.replace("configs/digits.yaml", ""), "bad {}: name a config file"),
        (lambda text: text.replace("workers=2", "workers=3"), "bad {}: it needs 3 workers, and its pods hold 2"),
        (lambda text: text.replace("workers=2", "workers=[1,3]"), "ok  {}: valid; it needs 1 workers"),
        (lambda text: text.replace("digits.yaml", "x.yaml"), "bad {}: configs/x.yaml: is not here; name a file"),
        (
            lambda text: f"{text} train.epochs=3 train.epochs=4",
            "bad {}: train.epochs twice: k8s/base/kustomization.yaml",
        ),
        (lambda text: text.replace("train ", "trian "), "bad {}: pipeline trian: is no training"),
        (lambda _: "python mine.py", "?   {}: python mine.py: is no training that is known here; write"),
    ],
)
def test_commands(change: Callable[[str], str], expected: str, kind: FakeKubectl, doctor: Doctor) -> None:
    out = doctor(with_command(change), bad=expected.startswith("bad"))
    assert line(out, expected.format("command of digits"))


def test_a_job_for_a_cluster_that_is_there(kind: FakeKubectl, doctor: Doctor) -> None:
    objects = with_command(str)
    [job] = of_kind(objects, "RayJob")
    del job["spec"]["rayClusterSpec"]
    job["spec"]["clusterSelector"] = {"ray.io/cluster": "mine"}
    out = doctor(objects)
    assert line(out, "ok  command of digits: valid; its cluster is not made by it")
    assert line(out, "ok  room: for all ")


def test_a_config_file_is_found_beside_the_manifests(
    kind: FakeKubectl, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = tmp_path / "project"
    (project / "configs").mkdir(parents=True)
    (project / "configs" / "digits.yaml").write_text((ROOT / "configs" / "digits.yaml").read_text())
    folder = write(project / "k8s", rendered(DEMO))
    monkeypatch.chdir("/")
    assert line(run("doctor", "--kubernetes", folder)[1], "ok  command of digits: valid")


# KubeRay, and other operators


@pytest.mark.skipif(not CRDS.is_dir(), reason="KubeRay's CRDs lie in ../shared, which is not here")
def test_fields_that_an_older_kuberay_does_not_know(kind: FakeKubectl, doctor: Doctor) -> None:
    assert line(doctor(DEMO), "ok  CRD of RayJob: knows all fields of the manifests")
    older = deepcopy(crds())
    for crd in older:
        spec = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"]
        spec.get("rayClusterSpec", {"properties": spec})["properties"].pop("authOptions")
    kind.has("crd", *older)
    out = doctor(DEMO, bad=True)
    assert line(out, "bad CRD of RayJob: does not know spec.rayClusterSpec.authOptions; install KubeRay 1.7 or newer")


def test_operators() -> None:
    demo = of_kind(rendered("base"), "RayJob")
    for installed, expected in (
        (operator("operator:v1.4.2"), "bad KubeRay: operator:v1.4.2 in kuberay-system is too old; install KubeRay 1.7"),
        (operator("operator:v1.10.1"), "ok  KubeRay: operator:v1.10.1 in kuberay-system is ready"),
        (
            operator("operator:v1", ready=0),
            "bad KubeRay: operator:v1 in kuberay-system is not ready; kubectl -n kuberay",
        ),
        (
            operator("localhost:5000/operator:nightly"),
            "?   KubeRay: localhost:5000/operator:nightly in kuberay-system ",
        ),
        (
            operator("operator:v1.7.0", "--watch-namespace", "team-a,team-b"),
            "bad KubeRay: operator:v1.7.0 in kuberay-system looks at the namespaces team-a,team-b, not at pipeline; ",
        ),
        (operator("operator:v1.7.0", "--watch-namespace=pipeline"), "ok  KubeRay: "),
    ):
        for label in ("Helm", "kustomize"):
            answers: dict[str, list[Object]] = {"operators of Helm": [], "operators of kustomize": []}
            [check] = check_operator(demo, (answers | {f"operators of {label}": [installed]}).__getitem__)
            assert str(check).startswith(expected)


def test_apis_of_other_operators(gpus: FakeKubectl, doctor: Doctor) -> None:
    gpus.says("api-versions", f"{BUILT_IN} ray.io/v1 kueue.x-k8s.io/v1beta1")
    text = line(doctor("overlays/kueue", bad=True), "bad APIs: kueue.x-k8s.io/v1beta2 missing")
    assert text.endswith(", though kueue.x-k8s.io/v1beta1 is there; install Kueue, or take another overlay")


# Claims


def test_provisioners(kind: FakeKubectl, doctor: Doctor) -> None:
    """Which of them make volumes that several nodes mount."""
    bad = """rancher.io/local-path ebs.csi.aws.com disk.csi.azure.com pd.csi.storage.gke.io rook-ceph.rbd.csi.ceph.com
        kubernetes.io/aws-ebs kubernetes.io/no-provisioner missing"""
    good = """nfs.csi.k8s.io cluster.local/nfs-subdir-external-provisioner efs.csi.aws.com file.csi.azure.com
        filestore.csi.storage.gke.io rook-ceph.cephfs.csi.ceph.com driver.longhorn.io k8s.io/minikube-hostpath"""
    marks = dict.fromkeys(bad.split(), "bad") | dict.fromkeys(good.split(), "ok ") | {"csi.example.com": "?  "}
    kind.has("storageclasses", *(storage_class(one, one, default=False) for one in marks if one != "missing"))
    [namespace, one, *_] = claims_alone()
    objects = [namespace]
    for name in marks:
        objects.append(deepcopy(one))
        objects[-1]["metadata"]["name"] = name
        objects[-1]["spec"]["storageClassName"] = name
    out = doctor(objects, bad=True)
    found = {name: mark for mark, name in re.findall(r"^(...) claim (.*?): ", out, re.MULTILINE)}
    assert found == marks
    assert line(out, "bad claim missing: there is no class missing; name a class")


def test_claims_without_a_class_need_volumes(kind: FakeKubectl, doctor: Doctor) -> None:
    kind.has("storageclasses", storage_class("other", "nfs", default=False))
    out = doctor(claims_alone(), bad=True)
    assert line(out, "bad claim data: there is no default class; that would do, there are none; name a class")
    volumes = {
        f"by-hand-{size}": {"accessModes": ["ReadWriteMany"], "capacity": {"storage": size}}
        for size in ("1Ti", "200Gi")
    }
    status = {"phase": "Available"}
    kind.has("persistentvolumes", *({"metadata": {"name": n}, "spec": s, "status": status} for n, s in volumes.items()))
    out = doctor(claims_alone(), bad=True)
    assert line(out, "ok  claim data: there is no default class; that would do, there are by-hand-1Ti")
    assert line(out, "ok  claim storage: ").endswith("that would do, there are by-hand-1Ti, by-hand-200Gi")
    assert line(out, "bad claim mlflow: "), "ReadWriteOnce is another mode"


def test_folders_of_a_node_do_for_one_node(kind: FakeKubectl, doctor: Doctor) -> None:
    kind.has("storageclasses", storage_class("standard", "k8s.io/minikube-hostpath"))
    kind.has("nodes", *(node(name, cpu="8", memory="16Gi") for name in ("one", "two")))
    text = line(doctor(claims_alone(), bad=True), "bad claim data")
    assert "whose volumes are folders of one node; nodes here: 2; name a class" in text


def test_claims_that_are_there(kind: FakeKubectl, doctor: Doctor) -> None:
    waiting = claim("data", "Pending", "ReadWriteMany", "300Gi")
    others = [claim("storage", size="500Gi"), claim("mlflow", size="1Gi"), claim("old", "Lost")]
    kind.says("namespace", THERE)
    kind.has("persistentvolumeclaims", waiting, *others)
    earlier = warning(waiting, "Other", "other", at="2025-01-01T00:00:00Z")
    kind.has("events", warning(waiting, "ProvisioningFailed", KIND_RWX), earlier, warning(others[0], "Not", "its own"))
    out = doctor(claims_alone(), bad=True)
    text = line(out, "bad claim data: ")
    assert (
        f"Pending, 300Gi ReadWriteMany: ProvisioningFailed: {KIND_RWX}; kubectl -n pipeline delete pvc data; " in text
    )
    text = line(
        out, "bad claim storage: is there with ReadWriteOnce, and the manifests say ReadWriteMany; is there with"
    )
    assert "is there with 500Gi, and the manifests say 100Gi; a claim cannot be changed: " in text
    assert line(out, "ok  claim mlflow: Bound, 1Gi ReadWriteOnce"), "a claim may grow"
    assert line(out, "bad claim old: Lost")
    applied = {one["metadata"]["name"] for one in kind.applied}
    assert applied == {"pipeline", "data", "mlflow"}, "what was told of storage is not told again"


# What the API server says


def test_what_it_would_refuse(kind: FakeKubectl, doctor: Doctor) -> None:
    kind.says("namespace", THERE)
    assert line(doctor(claims_alone()[:1]), "ok  apply: the API server takes 1 of 1 objects (dry run)")
    other = "; another variant was applied before: take it away first (docs/cluster.md, Take it away)"
    says = "; the API server says so (kubectl apply --dry-run=server): correct the manifests, or ask for the right"
    refusals = {
        'Warning: resource namespaces/pipeline is missing the annotation "last-applied-configuration"': "",
        'Warning: would violate PodSecurity "restricted:latest": runAsNonRoot != true': None,
        'The StatefulSet "a" is invalid: spec: Forbidden: updates to statefulset spec for fields other than': None,
        """The PersistentVolumeClaim "b" is invalid: spec: Forbidden: spec is immutable after creation except
        @@ -1,6 +1,6 @@
        -  "ReadWriteMany" """: 'The PersistentVolumeClaim "b" is invalid: spec: Forbidden: spec is immutable after '
        "creation except",
        """The Job "c" is invalid: spec.template: Invalid value: core.PodTemplateSpec{Name:""}: field is immutable""": (
            'The Job "c" is invalid: spec.template: field is immutable'
        ),
        """The Service "d" is invalid:\n* spec.x: one\n* spec.y: two""": (
            'The Service "d" is invalid: * spec.x: one * spec.y: two'
        ),
        """Error from server (Forbidden): error when applying patch:\n{"metadata":{}}\nto:\nResource: "rayjobs"
        Name: "e", Namespace: "pipeline"
        for: "STDIN": error when patching "STDIN": admission webhook "f" denied the request: why""": (
            'admission webhook "f" denied the request: why'
        ),
        'Error from server (Forbidden): error when creating "STDIN": exceeded quota: team': ("exceeded quota: team"),
        'Error from server (BadRequest): "' + "long" * 1000: '"' + "long" * 74 + "lon",
    }
    kind.refuses("apply", "\n".join(refusals))
    out = doctor(claims_alone()[:1], bad=True)
    told = [error if text is None else text for error, text in refusals.items()]
    told = [text + (other if "immutable" in text or "statefulset" in text else says) for text in told if text]
    assert sorted(re.findall(r"^bad apply: (.*)", out, re.MULTILINE)) == sorted(told)


def test_kinds_that_are_missing_are_told_once(kubectl: FakeKubectl, doctor: Doctor) -> None:
    kubectl.says("namespace", THERE)
    assert line(doctor(DEMO, bad=True), "ok  apply: ")
    assert {one["kind"] for one in rendered(DEMO)} - {one["kind"] for one in kubectl.applied} == {"RayJob"}


def test_a_namespace_that_nothing_makes(kind: FakeKubectl, doctor: Doctor) -> None:
    out = doctor(claims_alone()[1:], bad=True)
    assert line(out, "bad apply: the namespace pipeline is not there yet; kubectl create namespace pipeline")


# Secrets


def test_secrets_that_nothing_makes(gpus: FakeKubectl, doctor: Doctor) -> None:
    start = "bad Secrets: missing: s3-credentials, which resnet152/head, resnet152/gpu read; "
    text = line(doctor("overlays/s3", bad=True), start)
    assert text.endswith("kubectl -n pipeline create secret generic ... (docs/cluster.md, Secrets)")
    gpus.says("secrets", "secret/other\nsecret/s3-credentials\n")
    assert line(doctor("overlays/s3"), "ok  Secrets: s3-credentials there")


def test_secrets_of_all_kinds() -> None:
    of_env = {"name": "a", "valueFrom": {"secretKeyRef": {"name": "of-env"}}}
    optional = {"name": "b", "valueFrom": {"secretKeyRef": {"name": "not-needed", "optional": True}}}
    of_env_from = [{"secretRef": {"name": "of-env-from"}}, {"configMapRef": {"name": "none"}}]
    spec = {
        "containers": [{"env": [{"name": "c", "value": "d"}, of_env], "envFrom": of_env_from}],
        "initContainers": [{"env": [optional]}],
        "volumes": [{"emptyDir": {}}, {"secret": {"secretName": "of-volume"}}],
        "imagePullSecrets": [{"name": "of-registry"}],
    }
    job = {"kind": "Job", "metadata": {"name": "job"}, "spec": {"template": {"spec": spec}}}
    names = {"of-env-from", "of-env", "of-volume", "of-registry"}
    assert manifests.secrets([job]) == {name: ["job"] for name in names}
    secret = {"kind": "Secret", "metadata": {"name": "of-env"}}
    assert manifests.secrets([job, secret]).keys() == names - {"of-env"}


# Room


def room_of(variant: str, *nodes: Object) -> str:
    return "\n".join(map(str, check_room(list(manifests.pods(rendered(variant))), rooms(nodes, []), "")))


def test_labels_and_taints_are_named() -> None:
    start = "bad room: no node takes 4 of 4 pods resnet152/gpu (64 CPU, 256 GiB, 8 nvidia.com/gpu): "
    spot, stable = ({"pipeline/capacity": one} for one in ("spot", "stable"))
    label = "kubectl label node NODE pipeline/capacity=spot; or name your own labels in the overlay"
    text = line(room_of("overlays/spot", node("a", cpu="127")), start)
    assert text == f"{start}none that is ready has the labels pipeline/capacity=spot; {label}"
    nodes = [node(f"spot-{n}", cpu="127", memory="1000Gi", gpu="8", labels=spot) for n in range(4)]
    for effect, value, bad in (("NoSchedule", "spot", False), ("NoExecute", "spot", True), ("NoSchedule", "no", True)):
        for one in nodes:
            one["spec"]["taints"] = [{"key": "pipeline/capacity", "value": value, "effect": effect}]
        out = room_of("overlays/spot", node("stable", cpu="64", memory="256Gi", labels=stable), *nodes)
        if bad:
            assert f"taints keep them off: pipeline/capacity={value}:{effect}; give the pods" in line(out, start)
        else:
            assert line(out, "ok  room: ")


def test_a_device_that_is_missing() -> None:
    nodes = [node(f"n{number}", cpu="127", memory="1000Gi", gpu="8") for number in range(3)]
    text = line(room_of("overlays/rdma", *nodes), "bad room: no node takes 2 of 2 pods resnet152/gpu")
    assert "offers rdma/hca_shared_devices_a; install the device plugin that offers rdma/" in text


def test_other_pods_take_room_and_our_own_do_not(gpus: FakeKubectl, doctor: Doctor) -> None:
    job = of_kind(rendered("base"), "RayJob")[0]
    template = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"]
    labels = template["metadata"]["labels"] | {"ray.io/cluster": "resnet152-abcde"}
    gpus.has("pods-everywhere", pod("worker", "pipeline", on="gpu-1", labels=labels, **{"nvidia.com/gpu": "8"}))
    text = line(doctor(bad=True), "bad room: no node takes 1 of 2 pods resnet152/gpu")
    assert "none is left with enough of all at once; add nodes" in text
    gpus.says("api-versions", f"{BUILT_IN} ray.io/v1 kueue.x-k8s.io/v1beta2")
    assert "(beside pods that never end, since Kueue waits for others" in line(doctor("overlays/kueue"), "ok  room: ")
    status = {"jobDeploymentStatus": "Running", "rayClusterName": "resnet152-abcde"}
    gpus.has("rayjobs", {"kind": "RayJob", "metadata": meta("resnet152"), "status": status})
    assert line(doctor(), "ok  room: ")
    gpus.has("pods-everywhere", *(pod(f"own-{n}", "kube-system", on=f"gpu-{n}", cpu="100") for n in (1, 2)))
    assert line(doctor("overlays/kueue", bad=True), "bad room: no node takes 2 of 2 pods resnet152/gpu")


def test_nodes_that_take_no_pods() -> None:
    nodes = [node(name, cpu="4", memory="8Gi") for name in ("good", "cordoned", "away")]
    nodes[1]["spec"]["unschedulable"] = True
    nodes[2]["status"]["conditions"] = [{"type": "Ready", "status": "Unknown"}]
    [room] = rooms(nodes, [pod("a", on="good", cpu="1500m"), pod("waits", cpu="4")])
    assert (room.name, room.free["cpu"], room.offered["cpu"]) == ("good", 2500, 4000)
    group = Pods("a", 1, pod("a", cpu="3")["spec"], {})
    [check] = check_room([group], [room], "")
    assert str(check).startswith("bad room: no node takes 1 of 1 pods a (3 CPU): none has more than 2.5 CPU free; add")
    [check] = check_room([group], [], "")
    assert str(check).endswith("none is ready; kubectl describe nodes says why")


def test_quantities() -> None:
    thousand = {"": "1", "m": "0.001", "k": "1e3", "M": "1e6", "G": "1e9", "Ki": "1024", "Mi": str(2**20)}
    rng = random.Random(0)
    for _ in range(300):
        number = rng.choice([rng.randrange(5000), round(rng.random() * 100, 2)])
        suffix = rng.choice(list(thousand))
        assert thousandths(f"{number}{suffix}") == int(Decimal(str(number)) * Decimal(thousand[suffix]) * 1000)
    assert thousandths(8) == thousandths("8") == thousandths("8000m") == thousandths("8e0") == 8000


def test_a_pod_asks_for_its_containers_or_its_largest_init_container() -> None:
    def box(cpu: str, **more: Any) -> Object:
        return {"resources": {"requests": {"cpu": cpu}}, **more}

    spec = {"containers": [box("1"), box("500m"), {"resources": {"limits": {"cpu": "2", "memory": "1Gi"}}}, {}]}
    assert requests(spec) == Counter(pods=1000, cpu=3500, memory=2**30 * 1000)
    assert requests(spec | {"initContainers": [box("5"), box("4")]})["cpu"] == 5000
    assert requests(spec | {"initContainers": [box("3"), box("1", restartPolicy="Always")]})["cpu"] == 4500


def random_group(rng: random.Random, name: str) -> Pods:
    kinds = ["cpu", "memory"] + ["nvidia.com/gpu"] * rng.randrange(2)
    wanted = {kind: str(rng.randrange(1, 9)) for kind in kinds}
    return Pods(name, rng.randrange(1, 4), {"containers": [{"resources": {"requests": wanted}}]}, {})


def random_room(rng: random.Random, name: str) -> Room:
    kinds = ("cpu", "memory", "nvidia.com/gpu")
    amounts = Counter({"pods": 3000} | {kind: rng.randrange(20) * 1000 for kind in kinds})
    return Room(name, {}, [], amounts, amounts)


def test_placement_finds_room_only_where_there_is() -> None:
    """It never says yes where no placement exists; and alike pods find room as many times as nodes hold them."""
    rng = random.Random(0)
    num_placed = 0
    for _ in range(150):
        nodes = [random_room(rng, f"n{n}") for n in range(rng.randrange(1, 4))]
        alike = random_group(rng, "alike")
        held = sum(min(node.free[kind] // amount for kind, amount in alike.requests.items()) for node in nodes)
        assert place([alike], nodes).get("alike", 0) == max(0, alike.count - held)
        groups = [random_group(rng, f"g{n}") for n in range(2)]
        if not place(groups, nodes):
            num_placed += 1
            assert exists(groups, nodes)
    assert 20 < num_placed < 130


def exists(groups: list[Pods], nodes: list[Room]) -> bool:
    """By trying all placements."""
    pods = [group.requests for group in groups for _ in range(group.count)]
    for chosen in itertools.product(range(len(nodes)), repeat=len(pods)):
        used = [Counter[str]() for _ in nodes]
        for number, wanted in zip(chosen, pods, strict=True):
            used[number].update(wanted)
        if all(amounts <= node.free for node, amounts in zip(nodes, used, strict=True)):
            return True
    return False


# What is there already


def ray_job(state: str, *, name: str = "digits", minutes: float = 1, queue: str = "", **status: Any) -> Object:
    began = (datetime.now(UTC) - timedelta(minutes=minutes)).isoformat().replace("+00:00", "Z")
    labels = {"kueue.x-k8s.io/queue-name": queue} if queue else {}
    more = {"status": {"jobDeploymentStatus": state, **status}} if state else {}
    return {"kind": "RayJob", "metadata": meta(name, labels=labels, creationTimestamp=began), **more}


def test_ray_jobs(kind: FakeKubectl, doctor: Doctor) -> None:
    log = "Job entrypoint command failed with exit code 2\nlog\npipeline: optim.lrr: no such key\n"
    jobs = {
        "a": (ray_job("Running"), "ok  RayJob a: Running"),
        "b": (ray_job("Complete", jobStatus="SUCCEEDED"), "ok  RayJob b: Complete: SUCCEEDED"),
        "stopped": (
            ray_job("Complete", jobStatus="STOPPED"),
            "bad RayJob stopped: Complete: STOPPED; the end of its",
        ),
        "c": (ray_job("Initializing"), "ok  RayJob c: Initializing, for 1 minutes"),
        "d": (
            ray_job("Initializing", minutes=90, failed=3),
            "bad RayJob d: Initializing; 3 tries failed, for 90 minutes; see the log of KubeRay's operator",
        ),
        "e": (
            ray_job("", minutes=90),
            "bad RayJob e: not looked at by KubeRay, for 90 minutes; see the log of KubeRay's",
        ),
        "f": (ray_job("Suspended", queue="training"), "ok  RayJob f: Suspended; it waits in Kueue's training"),
        "g": (ray_job("Suspended"), "bad RayJob g: Suspended; set suspend: false"),
        "h": (
            ray_job("Failed", reason="AppFailed", message=log),
            "bad RayJob h: Failed: AppFailed: Job entrypoint command failed with exit code 2: pipeline: optim.lrr: no ",
        ),
        "i": (
            ray_job("ValidationFailed", message="bad name"),
            "bad RayJob i: ValidationFailed: bad name; correct what",
        ),
    }
    for name, (job, _) in jobs.items():
        job["metadata"]["name"] = name
    kind.has("rayjobs", *(job for job, _ in jobs.values()))
    owned = {"kind": "RayCluster", "metadata": meta("a-abcde", ownerReferences=[{"kind": "RayJob"}])}
    kind.has("rayclusters", owned, {"kind": "RayCluster", "metadata": meta("stays"), "status": {"state": "ready"}})
    out = doctor(without_job(DEMO), bad=True)
    for _, expected in jobs.values():
        line(out, expected)
    assert line(out, "ok  RayCluster stays: ready")
    assert "a-abcde" not in out


def test_why_pods_do_not_run(kind: FakeKubectl, doctor: Doctor) -> None:
    cannot_pull = {"reason": "ImagePullBackOff", "message": 'Back-off pulling image "pipeline:0.2.0"'}
    no_secret = {"reason": "CreateContainerConfigError", "message": 'secret "ray-token" not found'}
    crashes = {"reason": "CrashLoopBackOff", "message": "back-off 5m0s"}
    full = "0/1 nodes are available: 1 Insufficient cpu."
    waits = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": full}
    reasons = {
        f"Unschedulable: {full}: {{}}; the lines on claims and room say": {"conditions": [waits]},
        'ray-worker: ImagePullBackOff: Back-off pulling image "pipeline:0.2.0": {}; push the image where the nodes': (
            container_state("ray-worker", waiting=cannot_pull)
        ),
        'main: CreateContainerConfigError: secret "ray-token" not found: {}; docs/cluster.md, Secrets': (
            container_state("main", waiting=no_secret)
        ),
        "main was killed for want of memory (OOMKilled): {}; raise the memory of these pods": (
            container_state("main", ended={"exitCode": 137, "reason": "OOMKilled"}) | {"phase": "Running"}
        ),
    }
    each = {
        "main: CrashLoopBackOff: its last exit code is 1: {0}; kubectl -n pipeline logs {0} -c main --previous": (
            container_state("main", waiting=crashes, ended={"exitCode": 1, "reason": "Error"})
        ),
        "Evicted: low on disk: {0}; kubectl": {"phase": "Failed", "reason": "Evicted", "message": "low on disk"},
    }
    pods, expected = list[Object](), list[str]()
    for text, status in (*reasons.items(), *each.items()):
        names = [f"worker-{len(pods)}", f"worker-{len(pods) + 1}"]
        pods += [{"metadata": meta(name), "spec": {}, "status": {"phase": "Pending", **status}} for name in names]
        expected += map(text.format, [", ".join(names)] if text in reasons else names)
    kind.has("rayjobs", ray_job("Initializing"))
    kind.has("pods", *pods)
    out = doctor(without_job(DEMO), bad=True)
    for text in expected:
        line(out, f"bad pods: {text}")
    assert line(out, "bad RayJob digits: Initializing, for 1 minutes; the other lines say why")


def test_pods_that_start_end_or_hang(kind: FakeKubectl, doctor: Doctor) -> None:
    def one(name: str, ended_minutes_ago: float | None = None, **status: Any) -> Object:
        gone = {}
        if ended_minutes_ago is not None:
            gone = {"deletionTimestamp": (datetime.now(UTC) - timedelta(minutes=ended_minutes_ago)).isoformat()}
        return {"metadata": meta(name, **gone), "spec": {}, "status": {"phase": "Pending", **status}}

    starting = container_state("main", waiting={"reason": "ContainerCreating"})
    kind.has("pods", one("ends", 0), one("starts", **starting), one("has-ended", phase="Succeeded"), one("waits"))
    assert line(doctor(without_job(DEMO)), "ok  RayJob: none in the namespace pipeline")
    unmounted = one("waits", **starting)
    kind.has("pods", one("hangs", 30), unmounted)
    kind.has("events", warning(unmounted, "FailedMount", "mount failed: exit status 32"))
    out = doctor(without_job(DEMO), bad=True)
    assert line(out, "bad pods: Terminating, 30 minutes after its grace period: hangs; if its node is gone")
    assert line(
        out, "bad pods: FailedMount: mount failed: exit status 32: waits; kubectl -n pipeline describe pod waits"
    )


def test_a_stuck_claim_is_why_a_job_waits(kind: FakeKubectl, doctor: Doctor) -> None:
    """As of `kubectl apply -f k8s/` on kind: the pods say nothing, while their claims fail."""
    waiting = claim("storage", "Pending", "ReadWriteMany", "100Gi")
    kind.says("namespace", THERE)
    kind.has("persistentvolumeclaims", waiting)
    kind.has("events", warning(waiting, "ProvisioningFailed", KIND_RWX))
    kind.has("rayjobs", ray_job("Initializing"))
    out = doctor(claims_alone(), bad=True)
    text = line(out, "bad claim storage: Pending, 100Gi ReadWriteMany: ProvisioningFailed")
    assert "NodePath only supports ReadWriteOnce" in text
    assert line(out, "bad RayJob digits: Initializing, for 1 minutes; the other lines say why")
