#!/usr/bin/env bash
# Follow a RayJob from its first second to its end: what it waits for, then the training's log, and that of each retry.
#   scripts/follow_rayjob.sh NAMESPACE RAYJOB
# Ends with 0 where the training succeeded, else with 1.
set -euo pipefail

if [ $# -ne 2 ]; then
    echo "usage: scripts/follow_rayjob.sh NAMESPACE RAYJOB, such as: pipeline-demo digits" >&2
    exit 2
fi
if ! command -v kubectl >/dev/null; then
    echo "follow_rayjob.sh: kubectl is not here" >&2
    exit 2
fi
namespace=$1 rayjob=$2 told='' pod='' since=''

tell() { # each line once in a row
    [ "$1" = "$told" ] || echo "$rayjob: $1" >&2
    told=$1
}

errors=$(mktemp)
trap 'rm -f "$errors"' EXIT

ask() { # an error is told, and asked again; but not kubectl's own log, which has another clock each time
    kubectl --namespace "$namespace" --request-timeout=20s get "$@" 2>"$errors" ||
        echo "error: $(grep -v '^[EWI][0-9]\{4\} ' "$errors" || echo "kubectl get $1 fails")"
}

waits() { # the first of its pods that does not run, and why
    ask pods --no-headers | awk -v job="$rayjob-" 'index($1, job) == 1 && $3 !~ /Running|Completed|Terminating/ { print $1, $3; exit }'
}

# KubeRay names the submitter's Job as the RayJob; a retry makes a new one. A pod that waits has no log.
newest_submitter() {
    ask pods --selector="batch.kubernetes.io/job-name=$rayjob" --sort-by=.metadata.creationTimestamp \
        --output=jsonpath='{range .items[?(@.status.phase!="Pending")]}{.metadata.name} {.status.phase}{"\n"}{end}' | tail -1
}

while :; do
    state=$(ask rayjob "$rayjob" --ignore-not-found --output=jsonpath='is {.status.jobDeploymentStatus} {.status.jobStatus} {.status.reason}')
    read -r newest phase <<<"$(newest_submitter)"
    case $state in
    '')
        if [ -n "$pod" ]; then
            tell "is deleted"
            exit 1
        fi
        tell "there is no RayJob of this name in the namespace $namespace yet; waiting for kubectl apply"
        ;;
    *error:*) tell "$state" ;;
    *)
        if [ -n "${phase:-}" ] && [ "$newest" != error: ] && { [ "$newest" != "$pod" ] || [ "$phase" = Running ]; }; then
            [ "$newest" = "$pod" ] || since='' # a stream that breaks is taken up again
            pod=$newest
            kubectl --namespace "$namespace" logs --follow $since "$pod" || true
            since=--since=5s # by the cluster's clock; some lines may come twice
            sleep 1
            continue
        fi
        case $state in
        'is Complete SUCCEEDED'*) exit 0 ;;
        'is Complete'*)
            tell "$(echo ${state#is }); to start it again: kubectl --namespace $namespace delete rayjob $rayjob, and apply"
            exit 1
            ;;
        'is Failed'*)
            tell "$(echo ${state#is }); the log says why, or: pipeline doctor --kubernetes FOLDER, the one that you applied"
            exit 1
            ;;
        esac
        state=$(echo ${state#is })
        tell "$(echo ${state:-KubeRay has not looked at it yet} $(waits))"
        ;;
    esac
    sleep 3
done
