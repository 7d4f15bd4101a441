"""Lines of `pipeline doctor --kubernetes` about claims: whether a class makes the volumes that they ask for."""

import re
from collections.abc import Iterator, Sequence

from pipeline.cluster.doctor.check_results import Check, name_some
from pipeline.cluster.doctor.kubectl import Cluster, Object
from pipeline.cluster.doctor.manifests import claims, name_of, thousandths

MANY = "ReadWriteMany"
# Provisioners of volumes that several nodes mount at once; that one node does; of folders on whichever node it is.
SHARED = r"nfs|cephfs|efs\.csi|fsx|filestore|file\.csi|longhorn|juicefs|beegfs|weka|lustre|smb\.csi|manila|gluster"
ONE_NODE = (
    r"local-path|(ebs|disk|pd)\.csi|rbd|cinder|aws-ebs|gce-pd|azure-disk|dobs\.csi|csi\.hetzner|linodebs|topolvm|"
    r"local\.csi|openebs\.io/local"
)
FOLDERS = "hostpath"
NONE = "kubernetes.io/no-provisioner"
IS_DEFAULT = "storageclass.kubernetes.io/is-default-class"
CLASS_FIX = "name a class as storageClassName in k8s/base/settings.yaml: `kubectl get storageclass` lists them"
MANY_FIX = (
    "name a class that has it (NFS, CephFS, a cloud's file store) as storageClassName in k8s/base/settings.yaml; "
    "for a single node ReadWriteOnce will do there"
)


def check_claims(objects: Sequence[Object], cluster: Cluster) -> Iterator[Check]:
    """Whether each claim will be bound: those that will be made, and those that are there."""
    wanted, there = claims(objects), {name_of(one): one for one in cluster("claims")}
    for name, claim in there.items():
        yield _check_old(claim, wanted.get(name), cluster)
    for name, spec in wanted.items():
        if name not in there:
            yield _check_new(f"claim {name}", spec, cluster)


def difference(claim: Object, wanted: Object) -> str:
    """In what a claim that is there can't become what the manifests say."""
    spec = claim["spec"]
    pairs = [(", ".join(spec["accessModes"]), ", ".join(wanted["accessModes"]))]
    if "storageClassName" in wanted:
        pairs.append((f"class {spec.get('storageClassName')}", f"class {wanted['storageClassName']}"))
    if _size(wanted) < _size(spec):
        pairs.append(tuple(one["resources"]["requests"]["storage"] for one in (spec, wanted)))
    return "; ".join(f"is there with {old}, and the manifests say {new}" for old, new in pairs if old != new)


def _size(spec: Object) -> int:
    return thousandths(spec["resources"]["requests"]["storage"])


def _check_old(claim: Object, wanted: Object | None, cluster: Cluster) -> Check:
    name, spec, phase = f"claim {name_of(claim)}", claim["spec"], claim["status"]["phase"]
    delete = f"kubectl -n {claim['metadata']['namespace']} delete pvc {name_of(claim)}"
    if wanted and (text := difference(claim, wanted)):
        fix = f"a claim cannot be changed: have the manifests say what is there, or save its files and {delete}"
        return Check(name, False, text, fix)
    text = f"{phase}, {spec['resources']['requests']['storage']} {', '.join(spec['accessModes'])}"
    if phase == "Pending" and (warning := warning_of(claim, cluster)):
        return Check(
            name, False, f"{text}: {warning}", f"{delete}; {MANY_FIX if MANY in spec['accessModes'] else CLASS_FIX}"
        )
    if phase == "Pending":  # without a warning; that there is no class is told as none
        return _check_new(name_of(claim), spec, cluster)
    return Check(name, phase != "Lost", text, f"its volume is gone: {delete}")


def warning_of(one: Object, cluster: Cluster) -> str:
    """The last warning about an object; empty where there is none."""
    own = [event for event in cluster("warnings") if event["involvedObject"].get("uid") == one["metadata"]["uid"]]
    last = max(own, key=lambda event: event.get("lastTimestamp") or event.get("eventTime") or "", default=None)
    return f"{last.get('reason')}: {' '.join((last.get('message') or '').split())}" if last else ""


def _check_new(name: str, spec: Object, cluster: Cluster) -> Check:
    modes, classes = spec["accessModes"], cluster("classes")
    defaults = [one for one in classes if one["metadata"].get("annotations", {}).get(IS_DEFAULT) == "true"]
    newest = max(defaults, key=lambda one: str(one["metadata"].get("creationTimestamp")), default=None)
    class_name = spec.get("storageClassName", name_of(newest) if newest else "")
    provisioners = {name_of(one): one["provisioner"] for one in classes} | {"": NONE}
    if not (provisioner := provisioners.get(class_name)):
        return Check(name, False, f"there is no class {class_name}", CLASS_FIX)
    if provisioner == NONE:
        there = [name_of(one) for one in cluster("volumes") if _would_do(one, spec, class_name)]
        why = f"class {class_name} makes no volumes" if class_name else "there is no default class"
        return Check(name, bool(there), f"{why}; that would do, there are {name_some(there) or 'none'}", CLASS_FIX)
    text = f"{', '.join(modes)} of class {class_name} ({provisioner})"
    if MANY not in modes or re.search(SHARED, provisioner):
        return Check(name, True, text)
    if re.search(FOLDERS, provisioner):
        num = len(cluster("nodes"))
        return Check(name, num == 1, f"{text}, whose volumes are folders of one node; nodes here: {num}", MANY_FIX)
    if re.search(ONE_NODE, provisioner):
        return Check(name, False, f"{text}, which has none of that mode: it would wait for ever", MANY_FIX)
    fix = "see that provisioner's documentation; or apply the claim alone, and `kubectl describe pvc` says it"
    return Check(name, None, f"{text}; whether it has that mode is not known here", fix)


def _would_do(volume: Object, spec: Object, class_name: str) -> bool:
    has = volume["spec"]
    return bool(
        volume["status"]["phase"] == "Available"
        and has.get("storageClassName", "") == class_name
        and {*spec["accessModes"]} <= {*has["accessModes"]}
        and thousandths(has["capacity"]["storage"]) >= _size(spec)
    )
