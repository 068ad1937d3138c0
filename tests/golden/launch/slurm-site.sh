#!/bin/bash
#SBATCH --job-name=r.train-42
#SBATCH --output=/place/scripts/train-42.out
#SBATCH --open-mode=append
#SBATCH --account=llm
#SBATCH --partition=gpu
#SBATCH --time=1-12:00:00
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --mem=488282M
#SBATCH --signal=B:TERM@600
#SBATCH --requeue
#SBATCH --qos=high

# train-42
set -uo pipefail
cd /place
module load cuda/12.8 hpcx
source ~/venv/bin/activate
export NCCL_DEBUG=WARN
step=train-42
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
number=$SLURM_JOB_ID
export SURGERY_TORCHRUN="srun --ntasks-per-node=1 --kill-on-bad-exit=1 apptainer exec --nv image.sif python3 -m torch.distributed.run --nnodes=2 --nproc-per-node=8 --rdzv-backend=c10d --rdzv-id=$number --rdzv-endpoint=$head:$((29500 + number % 1000))"
# Before the time limit Slurm sends TERM to this shell: the step stops in order, with status 75, and the job is queued again.
apptainer exec --nv image.sif python3 -m surgery run /place/runs/r --step "$step" &
child=$!
trap 'kill -TERM "$child"' TERM
wait "$child"; code=$?
while kill -0 "$child" 2>/dev/null; do wait "$child"; code=$?; done
if [[ $code -eq 75 ]]; then [[ $(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T || echo RUNNING) != RUNNING ]] || scontrol requeue "$SLURM_JOB_ID"; fi
exit "$code"
