"""k8s/overlays/rdma, and the image for it: what it changes, and that it changes nothing else.

That NCCL then uses RDMA could only be seen on two nodes that have it.
"""

import re
import shutil
from copy import deepcopy
from pathlib import Path

import pytest
from manifests import K8S, Object, component, identity, kustomize, of_kind, pods, rendered

VARIABLES = {"NCCL_NET": "IB", "NCCL_SOCKET_IFNAME": "=eth0", "NCCL_DEBUG": "WARN"}


def workers(objects: list[Object]) -> Object:
    """The container of the GPU pods."""
    [template] = [template for _, template in pods(objects) if component(template) == "ray-worker"]
    [container] = template["spec"]["containers"]
    return dict(container)


def without(container: Object, device: str) -> Object:
    """What is left of a worker without all that the overlay is meant to add."""
    out = deepcopy(container)
    for resources in out["resources"].values():
        resources.pop(device, None)
    out["env"] = [one for one in out["env"] if one["name"] not in VARIABLES]
    out["securityContext"]["capabilities"].pop("add", None)
    return out


def the_device(container: Object) -> str:
    [device] = container["resources"]["limits"].keys() - {"cpu", "memory", "nvidia.com/gpu"}
    return str(device)


def test_workers_get_the_device_and_what_nccl_is_to_know() -> None:
    container = workers(rendered("overlays/rdma"))
    device = the_device(container)
    assert re.fullmatch(r"[a-z.]+/[a-z_]+", device)
    assert container["resources"]["requests"][device] == container["resources"]["limits"][device] == "1"
    env = {one["name"]: one.get("value") for one in container["env"]}
    assert {name: env[name] for name in VARIABLES} == VARIABLES
    assert len(env) == len(container["env"])  # of two with one name Kubernetes takes the last


def test_all_else_is_the_base() -> None:
    """The head above all: it has no card, and its pods would wait for a device for ever."""
    base, rdma = rendered("base"), rendered("overlays/rdma")
    device = the_device(workers(rdma))
    assert without(workers(rdma), device) == workers(base)
    for objects in (base, rdma):
        assert [identity(one) for one in objects] == [identity(one) for one in base]
    for ours, theirs in zip(rdma, base, strict=True):
        if ours["kind"] == "RayJob":
            ours, theirs = deepcopy(ours), deepcopy(theirs)
            for job in (ours, theirs):
                del job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"]["containers"]
        assert ours == theirs or ours["kind"] == "Namespace"


def test_the_devices_name_is_changed_in_one_place() -> None:
    """What the comment there says to do does it: both lines, which follow each other."""
    lines = (K8S / "overlays" / "rdma" / "kustomization.yaml").read_text().splitlines()
    device = the_device(workers(rendered("overlays/rdma"))).replace("/", "~1")
    found = [number for number, line in enumerate(lines) if device in line]
    marked = next(number for number, line in enumerate(lines) if "CHANGE HERE, in both lines" in line)
    assert found == [marked + 2, marked + 3]


def test_without_the_line_of_ipc_lock_the_namespace_stays_restricted(tmp_path: Path) -> None:
    """Nodes with a high limit need no capability: then there is no exception to Pod Security either."""
    shutil.copytree(K8S, tmp_path / "k8s", symlinks=True)
    file = tmp_path / "k8s" / "overlays" / "rdma" / "kustomization.yaml"
    text, count = re.subn(r"^components: .*\n", "", file.read_text(), flags=re.MULTILINE)
    assert count == 1
    file.write_text(text)
    objects = kustomize(file.parent)
    assert of_kind(objects, "Namespace") == of_kind(rendered("base"), "Namespace")
    container = workers(objects)
    assert container["securityContext"] == workers(rendered("base"))["securityContext"]
    assert the_device(container) == the_device(workers(rendered("overlays/rdma")))


@pytest.mark.parametrize("package", ["libibverbs1", "ibverbs-providers"])
def test_the_image_has_what_nccl_opens(package: str, final_stage: str) -> None:
    """NCCL looks for libibverbs when it starts, and takes TCP where it finds none."""
    [installed] = re.findall(r"apt-get install [^&]*", final_stage)
    assert package in installed.split()


def test_the_image_asks_for_the_drivers_part_that_decodes_jpeg(final_stage: str) -> None:
    """Without a word NVIDIA's runtime brings compute and utility; nvJPEG opens libnvcuvid, which is in video."""
    [capabilities] = re.findall(r"NVIDIA_DRIVER_CAPABILITIES=(\S+)", final_stage)
    assert set(capabilities.split(",")) == {"compute", "utility", "video"}
    assert "NVIDIA_VISIBLE_DEVICES" not in final_stage  # it would give a pod all of a node's GPUs


@pytest.fixture
def final_stage() -> str:
    """The Dockerfile's last stage, without comments."""
    lines = (K8S.parent / "Dockerfile").read_text().splitlines()
    text = "\n".join(line for line in lines if not line.startswith("#"))
    return text[text.rindex("\nFROM ") :]
