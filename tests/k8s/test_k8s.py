"""The manifests of k8s/: what an API server and KubeRay would refuse, and what would not fit or not run.

No cluster is needed. A pod is what KubeRay is told of it.
"""

import json
import re
import shlex
import shutil
import subprocess
import tomllib
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from commands import ROOT
from manifests import (
    K8S,
    VARIANTS,
    Object,
    amount,
    component,
    containers,
    identity,
    kustomize,
    of_kind,
    pods,
    ray_specs,
    rendered,
)

from pipeline.cli.app import make_app
from pipeline.cli.train import config_to_train, train
from pipeline.config.schema import Config

VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
CRDS = ROOT.parent / "shared" / "kuberay-crds"
FIXED = ("PersistentVolumeClaim", "StatefulSet", "Job")  # objects that cannot be changed, or not all of them
RAY = ("ray-head", "ray-worker")
NODE_MONITOR_GRACE_S = 50  # of Kubernetes since 1.32; 40 before
RAYJOB_STATUS_CHECK_TIMEOUT_S = 300  # of KubeRay
POD_VOLUMES = {"emptyDir", "persistentVolumeClaim", "projected", "configMap", "secret"}


def plain() -> list[Object]:
    """What `kubectl apply -f k8s/` applies: the files of that folder alone."""
    paths = [path for path in sorted(K8S.iterdir()) if path.is_file()]
    return [one for path in paths for one in yaml.safe_load_all(path.read_text())]


def train_config(job: Object, monkeypatch: pytest.MonkeyPatch) -> Config:
    """The configuration that a RayJob's entrypoint means, as on a laptop."""
    monkeypatch.chdir(ROOT)
    execs, program, *words = shlex.split(job["spec"]["entrypoint"])
    assert (execs, program) == ("exec", "pipeline")  # no shell in between, which would leave a stopped job unreaped
    command, bound, _ = make_app().parse_args(words)
    assert command is train
    config, *overrides = bound.args
    return config_to_train(config, overrides, bound.kwargs.get("resume"))[0]


def strict(schema: Any) -> Any:
    """The schema of a CRD, with fields that it does not name refused."""
    if isinstance(schema, list):
        return [strict(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    out = {key: strict(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and "type" in schema:
        out.setdefault("additionalProperties", bool(schema.get("x-kubernetes-preserve-unknown-fields")))
    return out


def test_plain_files_are_the_base() -> None:
    assert {identity(one): one for one in plain()} == {identity(one): one for one in rendered("base")}


def test_kubectl_reads_the_folder_as_it_stands() -> None:
    """With its links, its order, and nothing that is not an object of Kubernetes; --local asks no API server."""
    command = ["kubectl", "label", "--local", "-f", str(K8S), "a=b", "-o", "name"]
    names = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    assert names[0] == "namespace/pipeline"
    assert len(names) == len(plain())


@pytest.mark.parametrize("variant", VARIANTS)
def test_valid_against_kubernetes(variant: str) -> None:
    ours = [one for one in rendered(variant) if one["apiVersion"].split("/")[0] not in ("ray.io", "kueue.x-k8s.io")]
    assert ours
    for one in ours:
        kubernetes_validate.validate(one, "1.32", strict=True)
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(ours[0] | {"unknown": 1}, "1.32", strict=True)


@cache
def kuberay_validator(kind: str) -> Any:
    text = (CRDS / f"ray.io_{kind.lower()}s.yaml").read_text()
    crd = yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    [schema] = [one["schema"]["openAPIV3Schema"] for one in crd["spec"]["versions"] if one["name"] == "v1"]
    return jsonschema.Draft202012Validator(strict(schema["properties"]["spec"]))


@pytest.mark.skipif(not CRDS.is_dir(), reason="KubeRay's CRDs lie in ../shared, which is not here")
@pytest.mark.parametrize("variant", VARIANTS)
def test_valid_against_kuberay(variant: str) -> None:
    found = of_kind(rendered(variant), "RayJob", "RayCluster")
    assert len(found) == 1
    validator = kuberay_validator(found[0]["kind"])
    validator.validate(found[0]["spec"])
    with pytest.raises(jsonschema.ValidationError, match="unknown"):
        validator.validate(found[0]["spec"] | {"unknown": 1})


@pytest.mark.parametrize("variant", VARIANTS)
def test_kuberay_accepts(variant: str) -> None:
    """Rules of its operator (v1.7) that are in no schema."""
    for one in of_kind(rendered(variant), "RayJob", "RayCluster"):
        assert re.fullmatch(r"[a-z]([-a-z0-9]{0,45}[a-z0-9])?", one["metadata"]["name"])
    for spec in ray_specs(rendered(variant)):
        assert spec["authOptions"] == {"mode": "token", "secretName": "ray-token"}
        assert spec["rayVersion"] == version("ray")  # it looks for one with tokens, and chooses its probes by it
        assert "enableInTreeAutoscaling" not in spec  # its account could change pods
        assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
        for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
            # With this label KubeRay's Services would not find their pods.
            assert "app.kubernetes.io/name" not in group["template"]["metadata"]["labels"]
    for job in of_kind(rendered(variant), "RayJob"):
        assert job["spec"]["shutdownAfterJobFinishes"]
        assert "suspend" not in job["spec"]  # applied again, it would suspend what Kueue has started
        assert job["spec"]["preRunningDeadlineSeconds"] >= 600  # else it would be "Initializing" for ever
        assert "command" not in job["spec"]["submitterPodTemplate"]["spec"]["containers"][0]
        assert job["spec"]["submitterPodTemplate"]["spec"]["restartPolicy"] == "Never"


@pytest.mark.parametrize("variant", VARIANTS)
def test_pods_are_restricted(variant: str) -> None:
    rdma = variant == "overlays/rdma"  # the one exception: its workers add IPC_LOCK, which only "privileged" admits
    [namespace] = of_kind(rendered(variant), "Namespace")
    levels = [
        namespace["metadata"]["labels"][f"pod-security.kubernetes.io/{mode}"] for mode in ("warn", "audit", "enforce")
    ]
    assert levels == ["restricted", "restricted", "privileged" if rdma else "restricted"]
    for _, template in pods(rendered(variant)):
        added = {"add": ["IPC_LOCK"]} if rdma and component(template) == "ray-worker" else {}
        spec = template["spec"]
        security = spec["securityContext"]
        assert security["runAsNonRoot"] is True
        assert security["runAsUser"] > 0
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        assert spec["automountServiceAccountToken"] is False
        assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys()
        for volume in spec["volumes"]:
            assert volume.keys() - {"name"} <= POD_VOLUMES, volume
        for one in containers(template):
            context = one["securityContext"]
            assert context["allowPrivilegeEscalation"] is False
            assert context["readOnlyRootFilesystem"] is True
            assert context["capabilities"] == {"drop": ["ALL"]} | added
            assert "/tmp" in {mount["mountPath"] for mount in one["volumeMounts"]}
            assert not any("hostPort" in port for port in one.get("ports", []))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_server_is_never_there_twice(variant: str) -> None:
    """A Deployment starts the next pod while the deleted one still ends, and both would write to one volume."""
    assert not of_kind(rendered(variant), "Deployment")
    assert all(one["spec"]["replicas"] == 1 for one in of_kind(rendered(variant), "StatefulSet"))


@pytest.mark.parametrize("variant", VARIANTS)
def test_compiled_kernels_are_kept_where_they_can_be_written(variant: str) -> None:
    """On the volume that outlives the pod, where there is one."""
    num_kept = 0
    for _, template in pods(rendered(variant)):
        for one in containers(template):
            kept = [env["value"] for env in one.get("env", []) if env["name"] == "TORCHINDUCTOR_CACHE_DIR"]
            num_kept += len(kept)
            mounts = {mount["mountPath"]: mount for mount in one["volumeMounts"]}
            for folder in kept:
                mount = mounts[str(Path(folder).parent)]
                assert not mount.get("readOnly", False)
                assert mount["name"] == ("cache" if variant == "overlays/s3" else "storage")
    assert num_kept == (0 if variant == "overlays/cpu-demo" else 2), "of the head and the workers"


@pytest.mark.parametrize("variant", VARIANTS)
def test_containers_are_bounded_and_watched(variant: str) -> None:
    for _, template in pods(rendered(variant)):
        for one in containers(template):
            resources = one["resources"]
            for kind in ("cpu", "memory"):
                assert amount(resources["requests"][kind]) <= amount(resources["limits"][kind])
            assert one["imagePullPolicy"] == "IfNotPresent"
            assert re.fullmatch(r"[a-z]+:\d+\.\d+(\.\d+)?(-bookworm)?", one["image"]), one["image"]
            assert not one["image"].startswith("pipeline:") or one["image"] == f"pipeline:{VERSION}"
        if component(template) in ("submitter", "make-secrets"):
            continue  # they end: there is nothing to be ready for, and they are started again if they fail
        for one in template["spec"]["containers"]:
            assert {"startupProbe", "readinessProbe", "livenessProbe"} <= one.keys(), one["name"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_pods_end_in_peace(variant: str) -> None:
    for spec in ray_specs(rendered(variant)):
        for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
            pod = group["template"]["spec"]
            [ray] = pod["containers"]
            env = {one["name"]: one.get("value") for one in ray["env"]}
            drain = int(env["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
            before = 0
            if group is spec["headGroupSpec"]:
                timeout, seconds, *words = ray["lifecycle"]["preStop"]["exec"]["command"]
                assert (timeout, words) == ("timeout", ["bash", "scripts/pre_stop.sh"])
                assert (ROOT / words[1]).exists()
                before = int(seconds)
                assert drain <= 15, "a deleted job's head would keep its room, for which the next one waits"
            assert before + drain < pod["terminationGracePeriodSeconds"]


def leaves_after_s(pod: Object) -> int:
    """How long after the loss of its node a pod is taken for lost, too."""
    [lost] = [one for one in pod["tolerations"] if one["key"] == "node.kubernetes.io/unreachable"]
    return NODE_MONITOR_GRACE_S + int(lost["tolerationSeconds"])


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_lost_head_is_done_without(variant: str) -> None:
    """By the constants of Kubernetes and KubeRay; tests/e2e/test_rayjob.py cuts a head off."""
    for spec in ray_specs(rendered(variant)):
        assert leaves_after_s(spec["headGroupSpec"]["template"]["spec"]) <= 60
    for job in of_kind(rendered(variant), "RayJob"):
        pod = job["spec"]["submitterPodTemplate"]["spec"]
        [submitter] = pod["containers"]
        probe = submitter["livenessProbe"]
        each_s = probe["periodSeconds"] * probe["failureThreshold"] + probe["terminationGracePeriodSeconds"] + 5
        first_s = max(each_s, leaves_after_s(pod))  # the submitter may have been on the lost node, too
        assert first_s + 10 + each_s + 20 + each_s < RAYJOB_STATUS_CHECK_TIMEOUT_S  # KubeRay's backoffLimit of it is 2
        assert "submitterConfig" not in job["spec"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_wrong_setting_is_not_tried_again(variant: str) -> None:
    for job in of_kind(rendered(variant), "RayJob"):
        [head] = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"]
        assert {"name": "PIPELINE_RAYJOB", "value": "true"} in head["env"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_entrypoint_fits_the_cluster(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = of_kind(rendered(variant), "RayJob")
    assert len(jobs) == (variant != "overlays/raycluster")
    for job in jobs:
        cfg = train_config(job, monkeypatch)
        # Two shells read it: the submitter's, and that of Ray's head.
        assert not set(job["spec"]["entrypoint"]) & set("&;|$<>(){}*?~`'\"\\#\n")
        assert cfg.run.name == job["metadata"]["name"]  # stable, so that a retry resumes
        assert cfg.cluster.cpus_per_worker  # the head is up before its workers: their size cannot be looked up
        [group] = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
        [worker] = group["template"]["spec"]["containers"]
        limits = worker["resources"]["limits"]
        cpus = int(group["rayStartParams"].get("num-cpus", 0)) or int(amount(limits["cpu"]))
        gpus = int(limits.get("nvidia.com/gpu", 0))
        assert cfg.cluster.device == ("gpu" if gpus else "cpu")
        per_node = gpus or cpus // cfg.cluster.cpus_per_worker
        assert per_node * cfg.cluster.cpus_per_worker <= cpus
        assert cfg.cluster.max_workers == per_node * group["replicas"]
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        assert cfg.cluster.min_workers == per_node * group["minReplicas"]
        for pod in (job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"], group["template"]["spec"]):
            [ray] = pod["containers"]
            mounts = {mount["mountPath"]: mount.get("readOnly", False) for mount in ray["volumeMounts"]}
            for place, writes in ((cfg.run.storage, True), (cfg.data.train, False), (cfg.data.val, False)):
                assert place.startswith("s3://") or mounts["/" + place.split("/")[1]] is not writes
            assert cfg.data.cache_dir is None or cfg.data.cache_dir in mounts
    images = {
        one["image"]
        for _, template in pods(rendered(variant))
        for one in containers(template)
        if component(template) != "postgres"
    }
    assert len(images) == 1


def test_the_demo_fits_a_small_node() -> None:
    demo = list(pods(rendered("overlays/cpu-demo")))
    totals = {"cpu": 0.0, "memory": 0.0}
    for count, template in demo:
        for kind, total in totals.items():
            main = sum(amount(one["resources"]["requests"][kind]) for one in template["spec"]["containers"])
            # KubeRay's own init container of a worker, wait-gcs-ready, asks for this much.
            first = {"cpu": 0.2, "memory": 256 * 2**20}[kind] if component(template) == "ray-worker" else 0
            inits = [amount(one["resources"]["requests"][kind]) for one in template["spec"].get("initContainers", [])]
            totals[kind] = total + count * max(main, first, *inits)
    assert totals["cpu"] <= 0.9  # of 2: kind's own pods and the operator ask for one
    assert totals["memory"] < 12 * 2**30
    assert {component(template) for _, template in demo} == {*RAY, "submitter", "mlflow", "make-secrets"}
    assert all("nvidia.com/gpu" not in json.dumps(template) for _, template in demo)


def test_scripts_that_pods_run_are_in_the_image() -> None:
    text = (ROOT / "Dockerfile").read_text()
    [copied] = re.findall(r"^COPY (scripts/.*) scripts/$", text, re.MULTILINE)
    called = {
        word
        for variant in VARIANTS
        for _, template in pods(rendered(variant))
        for one in containers(template)
        for word in [
            *one.get("command", []),
            *one.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", []),
        ]
        if word.startswith("scripts/")
    }
    assert called == set(copied.split())
    assert {f"!{path}" for path in called} <= set((ROOT / ".dockerignore").read_text().split())


def test_settings_reach_all_they_are_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(K8S / "base", tmp_path / "base")
    settings = tmp_path / "base" / "settings.yaml"
    text = settings.read_text()
    for old, new in (
        ("resnet152.yaml", "v2.yaml"),
        ("run.name=resnet152", "run.name=mine"),
        ("/data/imagenet", "/data/mine"),
        ('nodes: "2"', 'nodes: "4"'),
        ('gpus: "8"', 'gpus: "2"'),
        ("workers=16", "workers=8"),
        ("http://localhost:5000", "https://mlflow.example.com"),
        ("ReadWriteMany", "ReadWriteOnce"),
        ("# storageClassName: NAME", "storageClassName: fast"),
    ):
        assert old in text
        text = text.replace(old, new)
    settings.write_text(text)
    objects = kustomize(tmp_path / "base")
    [job] = of_kind(objects, "RayJob")
    cfg = train_config(job, monkeypatch)
    assert (cfg.run.name, cfg.train.epochs, cfg.cluster.workers) == ("mine", 600, 8)
    assert (cfg.data.train, cfg.data.val) == ("/data/mine/train.arrow", "/data/mine/val.arrow")
    [group] = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (4, 4, 4)
    for resources in group["template"]["spec"]["containers"][0]["resources"].values():
        assert resources["nvidia.com/gpu"] == "2"
    assert cfg.mlflow.public_url == "https://mlflow.example.com"
    claims = [one["spec"] for one in of_kind(objects, "PersistentVolumeClaim")]
    claims += [
        one["spec"]
        for server in of_kind(objects, "StatefulSet")
        for one in server["spec"].get("volumeClaimTemplates", [])
    ]
    assert len(claims) == 4
    assert all((one["storageClassName"], one["accessModes"]) == ("fast", ["ReadWriteOnce"]) for one in claims)


def test_images_are_named_in_one_place(tmp_path: Path) -> None:
    """By digest, too; in the lists that overlays replace, too."""
    shutil.copytree(K8S, tmp_path / "k8s", symlinks=True)
    file = tmp_path / "k8s" / "base" / "kustomization.yaml"
    text, digests = file.read_text(), [f"sha256:{char * 64}" for char in "ab"]
    for old, new in zip(("pipeline, newTag: 0.2.0", "postgres, newTag: 17.6-bookworm"), digests, strict=True):
        assert f"newName: {old}" in text
        text = text.replace(f"newName: {old}", f"newName: registry/{old.partition(',')[0]}, digest: {new!r}")
    file.write_text(text)
    wanted = {f"registry/{name}@{digest}" for name, digest in zip(("pipeline", "postgres"), digests, strict=True)}
    for variant in VARIANTS:
        objects = kustomize(tmp_path / "k8s" / variant)
        images = {one["image"] for _, template in pods(objects) for one in containers(template)}
        assert images <= wanted, variant


def namespace(variant: str) -> str:
    [found] = of_kind(rendered(variant), "Namespace")
    return str(found["metadata"]["name"])


def test_overlays_can_be_applied_over_each_other() -> None:
    """The API server refuses to change claims and most of a StatefulSet, and applies the rest all the same."""

    def fixed(one: Object) -> Object:
        return {key: value for key, value in one["spec"].items() if one["kind"] != "StatefulSet" or key != "template"}

    base = {identity(one): fixed(one) for one in rendered("base") if one["kind"] in FIXED}
    for variant in VARIANTS:
        if variant == "overlays/cpu-demo":  # what it changes is refused; so it is elsewhere
            assert namespace(variant) != namespace("base")
            continue
        for one in rendered(variant):
            if one["kind"] in FIXED:
                assert fixed(one) == base[identity(one)], (variant, identity(one))


def test_labels_and_names() -> None:
    for variant in VARIANTS:
        for one in rendered(variant):
            assert one["metadata"]["labels"]["app.kubernetes.io/part-of"] == "pipeline", identity(one)
            if one["kind"] != "Namespace":
                assert one["metadata"]["namespace"] == namespace(variant), identity(one)
            assert "generateName" not in one["metadata"]


def test_the_guide_names_what_is_there() -> None:
    text = (ROOT / "docs" / "cluster.md").read_text()
    for path in re.findall(r"k8s/[\w./-]*\w", text):
        assert (ROOT / path).exists(), path
    for variant in VARIANTS:
        assert f"k8s/{variant}" in text
