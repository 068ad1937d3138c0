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

# Before the time limit the step gets TERM and stops in order; `timeout` then ends with 124.
timeout --signal=TERM 3300 /venv/python -m surgery run /place/runs/r --step "$step"; code=$?
if [[ $code -eq 124 ]]; then true; fi
exit "$code"
