#!/usr/bin/env bash
# Before a head's pod ends: trainings that were started here save a checkpoint and end, and are waited for.
# Their jobs end as failed, with code 130, so that a RayJob with a backoffLimit tries again, and resumes. (`pipeline stop`
# ends a job for good: KubeRay takes a stopped one for complete.) The pod's grace period bounds the wait.
set -u
waiting=()
for process in /proc/[0-9]*; do
    command=$(tr '\0' ' ' 2>/dev/null <"$process/cmdline") || continue
    # Each once: a second signal would end it without a checkpoint.
    if [[ $command == */pipeline\ train\ * ]] && kill -TERM "${process#/proc/}"; then waiting+=("$process"); fi
done
for process in "${waiting[@]}"; do
    while [ -d "$process" ]; do sleep 0.5; done
done
