#!/bin/bash
@directives@

# @about@
set -uo pipefail
cd @workdir@
@setup@
@step@
@torchrun@
# Before the time limit the step gets TERM and stops in order; `timeout` then ends with 124.
@timeout@@surgery@ run @folder@ --step "$step"; code=$?
if [[ $code -eq 124 ]]; then @requeue@; fi
exit "$code"
