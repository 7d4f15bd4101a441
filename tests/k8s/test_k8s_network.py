"""The NetworkPolicies of k8s/: open for what each pod really connects to, and for nothing else.

No cluster is needed: a small evaluator says what the policies mean.
"""

from collections.abc import Callable
from typing import Any

import pytest
from manifests import VARIANTS, Object, component, containers, of_kind, pods, rendered

# What the pods connect to, from their commands and variables; None: an address outside of the cluster.
KUBERAY = ({"kubernetes.io/metadata.name": "default"}, {"app.kubernetes.io/name": "kuberay-operator"})
KUSTOMIZED = ({"kubernetes.io/metadata.name": "default"}, {"app.kubernetes.io/component": "kuberay-operator"})
DNS = ({"kubernetes.io/metadata.name": "kube-system"}, {"k8s-app": "kube-dns"})
PROMETHEUS = ({"kubernetes.io/metadata.name": "monitoring", "pipeline/metrics": "allowed"}, {"app": "prometheus"})
STRANGER = ({"kubernetes.io/metadata.name": "default"}, {"app": "other"})
Peer = tuple[dict[str, str], dict[str, str]] | None  # labels of the namespace and of the pod
OPEN: list[tuple[Any, Any, int]] = [
    *((one, DNS, 53) for one in ("ray-head", "ray-worker", "submitter", "mlflow", "postgres")),
    *(
        (one, other, port)
        for one in ("ray-head", "ray-worker")
        for other in ("ray-head", "ray-worker")
        for port in (6379, 8265, 10002, 29500)
    ),
    ("ray-head", "mlflow", 5000),
    ("ray-worker", "mlflow", 5000),
    ("submitter", "ray-head", 8265),
    *((operator, "ray-head", 8265) for operator in (KUBERAY, KUSTOMIZED)),
    (PROMETHEUS, "ray-head", 8080),
    (PROMETHEUS, "ray-worker", 8080),
    ("mlflow", "postgres", 5432),
    ("make-secrets", None, 443),
    *(("make-secrets", None, port) for port in (6443, 8443, 16443)),
]
CLOSED: list[tuple[Any, Any, int]] = [
    ("ray-head", "postgres", 5432),
    ("ray-worker", "postgres", 5432),
    ("submitter", "postgres", 5432),
    ("submitter", "mlflow", 5000),
    ("submitter", "ray-worker", 8265),
    ("submitter", "ray-head", 6379),
    ("submitter", None, 443),
    ("ray-worker", None, 80),
    ("ray-head", None, 6443),
    ("mlflow", "ray-head", 8265),
    *(("mlflow", None, port) for port in (80, 443, 6443)),
    ("make-secrets", "mlflow", 5000),
    ("make-secrets", "postgres", 5432),
    ("postgres", "mlflow", 5000),
    ("postgres", None, 443),
    (STRANGER, "ray-head", 8265),
    (STRANGER, "ray-worker", 8080),
    (STRANGER, "mlflow", 5000),
    (STRANGER, "postgres", 5432),
    (PROMETHEUS, "ray-head", 8265),
    (KUBERAY, "ray-head", 6379),
]


def selects(selector: Object, labels: dict[str, str]) -> bool:
    assert selector.keys() <= {"matchLabels", "matchExpressions"}
    assert all(one["operator"] == "In" for one in selector.get("matchExpressions", []))
    return selector.get("matchLabels", {}).items() <= labels.items() and all(
        labels.get(one["key"]) in one["values"] for one in selector.get("matchExpressions", [])
    )


def lets(policies: list[Object], way: str, own: Peer, other: Peer, port: int) -> bool:
    """Whether the policies let `own` have a connection with `other`: way is Ingress or Egress."""
    here = {"kubernetes.io/metadata.name": "pipeline"}
    if own is None or own[0] != here:
        return True  # not ours to say
    ours = [one["spec"] for one in policies if way in one["spec"]["policyTypes"]]
    ours = [spec for spec in ours if selects(spec["podSelector"], own[1])]
    if not ours:
        return True

    def matches(peer: Object) -> bool:
        if "ipBlock" in peer:
            return False  # none but NodeLocal DNSCache's
        if other is None:
            return False
        home = selects(peer["namespaceSelector"], other[0]) if "namespaceSelector" in peer else other[0] == here
        return home and selects(peer.get("podSelector", {}), other[1])

    for rule in (rule for spec in ours for rule in spec.get(way.lower(), [])):
        peers = rule.get("to" if way == "Egress" else "from")
        ports = rule.get("ports")
        if (peers is None or any(map(matches, peers))) and (ports is None or port in [one["port"] for one in ports]):
            return True
    return False


def connects(objects: list[Object]) -> Callable[[Any, Any, int], bool]:
    policies = of_kind(objects, "NetworkPolicy")
    here = {"kubernetes.io/metadata.name": "pipeline"}
    labels = {component(template): template["metadata"]["labels"] for _, template in pods(objects)}

    def peer(one: Any) -> Peer:
        return (here, labels[one]) if isinstance(one, str) else one

    def connect(source: Any, target: Any, port: int) -> bool:
        a, b = peer(source), peer(target)
        return lets(policies, "Egress", a, b, port) and lets(policies, "Ingress", b, a, port)

    return connect


@pytest.mark.parametrize("variant", VARIANTS)
def test_network_is_open_for_what_pods_do_and_closed_for_the_rest(variant: str) -> None:
    objects = rendered(variant)
    here = {component(template) for _, template in pods(objects)}
    connect = connects(objects)

    def there(row: tuple[Any, Any, int]) -> bool:
        return all(one in here for one in row[:2] if isinstance(one, str))

    assert [row for row in OPEN if there(row) and not connect(*row)] == []
    assert [row for row in CLOSED if there(row) and connect(*row)] == []
    assert connect("ray-worker", None, 443) == (variant == "overlays/s3")
    ports = {port for source, target, port in OPEN if target == "mlflow"}
    for _, template in pods(objects):
        for one in containers(template):
            env = {variable["name"]: variable.get("value") for variable in one.get("env", [])}
            if "MLFLOW_TRACKING_URI" in env:
                assert env["MLFLOW_TRACKING_URI"] in {f"http://mlflow:{port}" for port in ports}
            if component(template) == "mlflow" and one["name"] == "mlflow":
                assert (env.get("POSTGRES_HOST") == "postgres") == ("postgres" in here)
