#!/usr/bin/env bash
# Before a head's pod ends: trainings that were started here save a checkpoint and end, and are waited for.
# Their jobs end as failed, with code 130, so that a RayJob with a backoffLimit tries again, and resumes. (`pipeline stop`
# ends a job for good: KubeRay takes a stopped one for complete.) The pod's grace period bounds the wait.
set -u

command_of() { # nothing of a process that has ended, also if its parent has not noticed
    { tr '\0' ' ' <"$1/cmdline"; } 2>/dev/null
}

waiting=()
for process in /proc/[0-9]*; do
    if [[ $(command_of "$process") == */pipeline\ train\ * ]] && kill -TERM "${process#/proc/}"; then
        waiting+=("$process")
    fi
done
for process in "${waiting[@]}"; do
    while [ -n "$(command_of "$process")" ]; do sleep 0.5; done
done
