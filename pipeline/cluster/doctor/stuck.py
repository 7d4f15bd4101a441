"""Lines of `pipeline doctor --kubernetes` about what is there already: why a RayJob does not start, from its pods."""

from collections import defaultdict
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

from pipeline.cluster.doctor.check_results import Check, name_some
from pipeline.cluster.doctor.check_volumes import warning_of
from pipeline.cluster.doctor.kubectl import Cluster, Object
from pipeline.cluster.doctor.manifests import labels_of, name_of

QUEUE = "kueue.x-k8s.io/queue-name"
SLOW_START = timedelta(minutes=15)  # an image of many GB is pulled meanwhile
SLOW_END = timedelta(minutes=1)  # after the grace period
STARTING = ("ContainerCreating", "PodInitializing")
IMAGE_FIX = (
    "push the image where the nodes pull from, and write its name into `images` of k8s/base/kustomization.yaml (with "
    "kind: kind load docker-image); a private registry needs imagePullSecrets"
)
FIXES = {
    **dict.fromkeys(("ErrImagePull", "ImagePullBackOff", "ErrImageNeverPull", "InvalidImageName"), IMAGE_FIX),
    "CreateContainerConfigError": "docs/cluster.md, Secrets; `kubectl logs job/make-secrets` says why one was not made",
}


def check_running(cluster: Cluster, namespace: str) -> Iterator[Check]:
    """A line for each RayJob and RayCluster of a namespace, and for each reason why pods there do not run."""
    now, pods = datetime.now(UTC), defaultdict[tuple[str, str], list[str]](list)
    for pod in cluster("pods"):
        if trouble := _trouble(pod, cluster, now):
            pods[trouble].append(name_of(pod))
    lost = any(one["status"]["phase"] != "Bound" and warning_of(one, cluster) for one in cluster("claims"))
    own = [one for one in cluster("rayclusters") if not one["metadata"].get("ownerReferences")]
    for ray in (*cluster("rayjobs"), *own):
        yield _check_ray(ray, bool(pods) or lost, now)
    for (text, fix), names in pods.items():
        yield Check("pods", False, f"{text}: {name_some(names)}", fix)
    if not (cluster("rayjobs") or own or pods):
        yield Check("RayJob", True, f"none in the namespace {namespace}")


def _check_ray(ray: Object, is_hindered: bool, now: datetime) -> Check:
    status, name = ray.get("status") or {}, f"{ray['kind']} {name_of(ray)}"
    state = status.get("jobDeploymentStatus") or status.get("state") or "not looked at by KubeRay"
    message = status.get("message", "").strip().splitlines() or [""]  # with the end of the command's log
    told = dict.fromkeys((state, status.get("jobStatus", ""), status.get("reason", ""), message[0], message[-1]))
    text = ": ".join(filter(None, told)) + (f"; {failed} tries failed" if (failed := status.get("failed")) else "")
    if status.get("jobStatus") == "STOPPED":
        fix = "the end of its submitter's log says why: a wrong setting, or a stop; then delete it, and apply again"
        return Check(name, False, text, fix)
    if state in ("Running", "Complete", "ready"):
        return Check(name, True, text)
    if "fail" in state.lower():
        fix = "correct what it says, delete the RayJob, and apply again: it goes on from its newest checkpoint"
        return Check(name, False, text, fix)
    if state.lower() == "suspended":
        queue = labels_of(ray).get(QUEUE, "")
        return Check(name, bool(queue), text + (queue and f"; it waits in Kueue's {queue}"), "set suspend: false")
    age = now - datetime.fromisoformat(status.get("startTime") or ray["metadata"]["creationTimestamp"])
    fix = "the other lines say why" if is_hindered else "see the log of KubeRay's operator"
    is_well = not is_hindered and age < SLOW_START
    return Check(name, is_well, f"{text}, for {age.total_seconds() / 60:.0f} minutes", fix)


def _trouble(pod: Object, cluster: Cluster, now: datetime) -> tuple[str, str] | None:
    """Why a pod does not run, and the fix; None: it runs, starts or has ended well."""
    status, more = (
        {"phase": "Unknown"} | pod["status"],
        f"kubectl -n {pod['metadata']['namespace']} describe pod {name_of(pod)}",
    )
    if end := pod["metadata"].get("deletionTimestamp"):
        late = now - datetime.fromisoformat(end)
        text = f"Terminating, {late.total_seconds() / 60:.0f} minutes after its grace period"
        fix = "if its node is gone: kubectl delete pod --force --grace-period=0"
        return (text, fix) if late > SLOW_END else None
    for condition in status.get("conditions", []):
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            fix = "the lines on claims and room say what is lacking"
            return f"{condition.get('reason')}: {condition.get('message')}", fix
    for one in (*status.get("initContainerStatuses", []), *status.get("containerStatuses", [])):
        waiting, now_ended = one["state"].get("waiting", {}), one["state"].get("terminated", {})
        ended = now_ended or ({} if one.get("ready") else one.get("lastState", {}).get("terminated", {}))
        if ended.get("reason") == "OOMKilled":
            return f"{one['name']} was killed for want of memory (OOMKilled)", "raise the memory of these pods"
        if (reason := waiting.get("reason", STARTING[0])) not in STARTING:
            detail = f"its last exit code is {ended['exitCode']}" if ended else waiting.get("message", "")
            logs = f"kubectl -n {pod['metadata']['namespace']} logs {name_of(pod)} -c {one['name']} --previous says why"
            return f"{one['name']}: {reason}: {detail}", FIXES.get(reason, logs)
        if status["phase"] == "Failed" and now_ended.get("exitCode"):
            return f"{one['name']} has ended with exit code {now_ended['exitCode']}", f"{more} says more"
    if status["phase"] == "Failed":
        return f"{status.get('reason')}: {status.get('message')}", f"{more} says more"
    warning = warning_of(pod, cluster) if status["phase"] == "Pending" else ""
    return (warning, f"{more} says more") if warning else None
