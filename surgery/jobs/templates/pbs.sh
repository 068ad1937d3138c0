#!/bin/bash
@directives@

# @about@
set -uo pipefail
cd @workdir@
@setup@
@step@
@torchrun@
# Before the time limit the step gets TERM and stops in order; 75 is then the status, and the job is queued again.
@timeout@@surgery@ run @folder@ --step "$step"; code=$?
if [[ $code -eq 75 ]]; then @requeue@; fi
exit "$code"
