#!/bin/bash
@directives@

# @about@
set -uo pipefail
cd @workdir@
@setup@
@step@
@torchrun@
# Before the time limit Slurm sends TERM to this shell: the step stops in order, and the job is queued again.
@surgery@ run @folder@ --step "$step" &
child=$!
stopped=
trap 'stopped=1; kill -TERM "$child"' TERM
wait "$child"; code=$?
while kill -0 "$child" 2>/dev/null; do wait "$child"; code=$?; done
if [[ $stopped && $code -ne 0 ]]; then @requeue@; fi
exit "$code"
