#!/usr/bin/env bash
# Follow a RayJob from its first second to its end: what it waits for, then the training's log, and that of each retry.
#   scripts/follow_rayjob.sh NAMESPACE RAYJOB
# Ends with 0 where the training succeeded, else with 1.
set -euo pipefail

if [ $# -ne 2 ]; then
    echo "usage: scripts/follow_rayjob.sh NAMESPACE RAYJOB, such as: pipeline-demo digits" >&2
    exit 2
fi
namespace=$1 rayjob=$2 followed='' told=''

ask() {
    kubectl --namespace "$namespace" --request-timeout=20s get "$@" 2>/dev/null || true
}

tell() { # each line once in a row
    [ "$1" = "$told" ] || echo "$rayjob: $1" >&2
    told=$1
}

# The name, node and state of each of its pods that does not run.
waiting_pods() {
    ask pods --no-headers --output=custom-columns=NAME:.metadata.name,PHASE:.status.phase,WHY:.status.conditions[?\(@.reason==\"Unschedulable\"\)].message |
        awk -v job="$rayjob" 'index($1, job "-") == 1 && $2 == "Pending" { print }' | head -1
}

until [ -n "$(ask rayjob "$rayjob" --output=name)" ]; do
    tell "there is no RayJob of this name in the namespace $namespace yet; waiting for kubectl apply"
    sleep 2
done
while :; do
    read -r deployment job reason <<<"$(ask rayjob "$rayjob" --output=jsonpath='{.status.jobDeploymentStatus} {.status.jobStatus} {.status.reason}')"
    # KubeRay names the submitter's Job as the RayJob; after a retry it is a new one. Only a pod whose container runs has a log.
    pod=$(ask pods --selector="batch.kubernetes.io/job-name=$rayjob" --sort-by=.metadata.creationTimestamp \
        --output=jsonpath='{range .items[?(@.status.phase!="Pending")]}{.metadata.name}{"\n"}{end}' | tail -1)
    if [ -n "$pod" ] && [ "$pod" != "$followed" ]; then
        tell "the log of $pod"
        kubectl --namespace "$namespace" logs --follow "$pod" && followed=$pod || sleep 2 # a connection that breaks begins again
        continue
    fi
    case ${deployment:-New} in
    Complete)
        tell "$job"
        [ "$job" = SUCCEEDED ] && exit 0 || exit 1
        ;;
    Failed)
        tell "failed: ${reason:-$job}; what it lacked: pipeline doctor --kubernetes"
        exit 1
        ;;
    *) tell "${deployment:-New}${job:+, $job} $(waiting_pods)" ;;
    esac
    sleep 3
done
