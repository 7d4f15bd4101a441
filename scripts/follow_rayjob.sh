#!/usr/bin/env bash
# Follow a RayJob from its first second to its end: what it waits for, then the training's log, and that of each retry.
#   scripts/follow_rayjob.sh NAMESPACE RAYJOB
# Ends with 0 where the training succeeded, else with 1.
set -euo pipefail

if [ $# -ne 2 ]; then
    echo "usage: scripts/follow_rayjob.sh NAMESPACE RAYJOB, such as: pipeline-demo digits" >&2
    exit 2
fi
namespace=$1 rayjob=$2 told='' pod='' since=''

tell() { # each line once in a row
    [ "$1" = "$told" ] || echo "$rayjob: $1" >&2
    told=$1
}

ask() { # what kubectl cannot be told is said, and asked again
    kubectl --namespace "$namespace" --request-timeout=20s get "$@" 2>&1 || echo "error: kubectl get $1"
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
    *error:* | *"Error from server"*) tell "$state" ;;
    *)
        if [ -n "${phase:-}" ] && [ "$newest" != error: ] && { [ "$newest" != "$pod" ] || [ "$phase" = Running ]; }; then
            [ "$newest" = "$pod" ] || since='' # a stream that breaks is taken up again
            pod=$newest
            kubectl --namespace "$namespace" logs --follow ${since:+"--since-time=$since"} "$pod" || true
            since=$(date -u +%Y-%m-%dT%H:%M:%SZ)
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
            tell "$(echo ${state#is }); what it lacked: pipeline doctor --kubernetes"
            exit 1
            ;;
        esac
        tell "$(echo ${state#is } $(waits))"
        ;;
    esac
    sleep 3
done
