"""Accounts and Secrets of k8s/: who makes them, who reads them, and that nobody may do more."""

import json
import re
import subprocess
import sys
from functools import cache

import pytest
from commands import ROOT
from manifests import VARIANTS, Object, component, containers, identity, of_kind, pods, rendered
from secrets_api import FakeApi


def make_secrets(objects: list[Object]) -> list[str]:
    """The Job's command, as it runs here."""
    [job] = of_kind(objects, "Job")
    [container] = job["spec"]["template"]["spec"]["containers"]
    program, script, namespace, *names = container["command"]
    assert (program, namespace) == ("python", "$(NAMESPACE)")
    return [sys.executable, str(ROOT / script), job["metadata"]["namespace"], *names]


def made_secrets(objects: list[Object]) -> dict[str, dict[str, str]]:
    """What the Job really makes, of an API server that has nothing yet."""
    return _made_secrets(json.dumps(make_secrets(objects)))


@cache
def _made_secrets(command: str) -> dict[str, dict[str, str]]:
    with FakeApi() as api:
        api.run(json.loads(command))
        return api.secrets


def test_secrets_are_made_once() -> None:
    command = make_secrets(rendered("base"))
    with FakeApi() as api:
        api.secrets["postgres"] = {"password": "of the user's own"}
        api.run(command)
        first = dict(api.secrets)
        api.run(command)
        assert api.secrets == first
        assert first["postgres"] == {"password": "of the user's own"}
        assert set(first) == {"mlflow-login", "postgres", "ray-token"}
        assert all(len(first["mlflow-login"][key]) >= 24 for key in ("password", "flask-secret-key"))
        api.refuse = True
        with pytest.raises(subprocess.CalledProcessError):  # the kubelet tries again
            api.run(command)


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_a_pod_refers_to_is_there(variant: str) -> None:
    objects = rendered(variant)
    names = {identity(one) for one in objects}
    assert not of_kind(objects, "Secret")
    keys = {(name, key) for name, values in made_secrets(objects).items() for key in values}
    for _, template in pods(objects):
        spec = template["spec"]
        assert ("ServiceAccount", spec["serviceAccountName"]) in names
        volumes = {one["name"] for one in spec["volumes"]}
        if component(template) == "postgres":
            volumes.add("postgres")  # of its claim template
        for volume in spec["volumes"]:
            if claim := volume.get("persistentVolumeClaim"):
                assert ("PersistentVolumeClaim", claim["claimName"]) in names
        for one in containers(template):
            assert {mount["name"] for mount in one["volumeMounts"]} <= volumes
            for variable in one.get("env", []):
                assert not re.search("PASSWORD|SECRET|TOKEN", variable["name"]) or "valueFrom" in variable
                if secret := variable.get("valueFrom", {}).get("secretKeyRef"):
                    assert (secret["name"], secret["key"]) in keys
            for source in one.get("envFrom", []):
                assert (variant, source) == ("overlays/s3", {"secretRef": {"name": "s3-credentials"}})
    for one in of_kind(objects, "PodDisruptionBudget", "Service"):
        wanted = one["spec"]["selector"]
        wanted = wanted.get("matchLabels", wanted)
        assert any(wanted.items() <= template["metadata"]["labels"].items() for _, template in pods(objects))
    assert {one["metadata"]["name"] for one in of_kind(objects, "PodDisruptionBudget")} == {
        name for kind, name in names if kind == "StatefulSet"
    }


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_account_may_do_one_thing(variant: str) -> None:
    objects = rendered(variant)
    [binding] = of_kind(objects, "RoleBinding", "ClusterRoleBinding")
    [role] = of_kind(objects, "Role", "ClusterRole")
    assert role["rules"] == [{"apiGroups": [""], "resources": ["secrets"], "verbs": ["create"]}]
    assert [one["name"] for one in binding["subjects"]] == ["make-secrets"]
    users = [
        component(template) for _, template in pods(objects) if template["spec"]["serviceAccountName"] == "make-secrets"
    ]
    assert users == ["make-secrets"]
    assert all(one["automountServiceAccountToken"] is False for one in of_kind(objects, "ServiceAccount"))
    holders = [
        one["name"]
        for _, template in pods(objects)
        for one in containers(template)
        for volume in template["spec"]["volumes"]
        if "projected" in volume and volume["name"] in {mount["name"] for mount in one["volumeMounts"]}
    ]
    assert holders == ["make-secrets"]
