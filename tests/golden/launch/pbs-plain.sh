#!/bin/bash
#PBS -N r.prep
#PBS -o /place/scripts/prep.out
#PBS -j oe
#PBS -l select=1
#PBS -l walltime=01:00:00
#PBS -r n

# Prepare it
set -uo pipefail
cd /place

step=prep

# Before the time limit the step gets TERM and stops in order; 75 is then the status, and the job is queued again.
timeout --foreground --preserve-status --signal=TERM 3300 /venv/python -m surgery run /place/runs/r --step "$step"; code=$?
if [[ $code -eq 75 ]]; then true; fi
exit "$code"
