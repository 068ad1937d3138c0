#!/bin/bash
#SBATCH --job-name=r.soup
#SBATCH --output=/place/scripts/soup.out
#SBATCH --open-mode=append
#SBATCH --account=llm
#SBATCH --partition=gpu
#SBATCH --time=0-01:00:00
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --signal=B:TERM@600
#SBATCH --requeue
#SBATCH --qos=high

# soup
set -uo pipefail
cd /place
module load cuda/12.8 hpcx
source ~/venv/bin/activate
export NCCL_DEBUG=WARN
step=soup
export SURGERY_TORCHRUN="python3 -m torch.distributed.run --nnodes=1 --nproc-per-node=2 --standalone"
# Before the time limit Slurm sends TERM to this shell: the step stops in order, with status 75, and the job is queued again.
apptainer exec --nv image.sif python3 -m surgery run /place/runs/r --step "$step" &
child=$!
trap 'kill -TERM "$child"' TERM
wait "$child"; code=$?
while kill -0 "$child" 2>/dev/null; do wait "$child"; code=$?; done
if [[ $code -eq 75 ]]; then [[ $(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T || echo RUNNING) != RUNNING ]] || scontrol requeue "$SLURM_JOB_ID"; fi
exit "$code"
