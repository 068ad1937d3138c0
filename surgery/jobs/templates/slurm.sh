#!/bin/bash
@directives@

# @about@
set -uo pipefail
cd @workdir@
@setup@
@step@
@torchrun@
# Before the time limit Slurm sends TERM to this shell: the step stops in order, with status 75, and the job is queued again.
@surgery@ run @folder@ --step "$step" &
child=$!
trap 'kill -TERM "$child"' TERM
wait "$child"; code=$?
while kill -0 "$child" 2>/dev/null; do wait "$child"; code=$?; done
if [[ $code -eq 75 ]]; then @requeue@; fi
exit "$code"
