#!/bin/bash
#PBS -N r.train-42
#PBS -o /place/scripts/train-42.out
#PBS -j oe
#PBS -P llm
#PBS -q gpu
#PBS -l select=2:ncpus=32:ngpus=8:mpiprocs=8:mem=488282mb
#PBS -l walltime=36:00:00
#PBS -r y
#PBS -p 100

# train-42
set -uo pipefail
cd /place
module load cuda/12.8 hpcx
source ~/venv/bin/activate
export NCCL_DEBUG=WARN
step=train-42
head=$(head -n 1 "$PBS_NODEFILE")
number=${PBS_JOBID%%[.[]*}
export SURGERY_TORCHRUN="mpirun --map-by ppr:1:node -x TORCH_ELASTIC_SHUTDOWN_TIMEOUT apptainer exec --nv image.sif python3 -m torch.distributed.run --nnodes=2 --nproc-per-node=8 --rdzv-backend=c10d --rdzv-id=$number --rdzv-endpoint=$head:$((29500 + number % 1000))"
# Before the time limit the step gets TERM and stops in order; 75 is then the status, and the job is queued again.
timeout --foreground --preserve-status --signal=TERM 129000 apptainer exec --nv image.sif python3 -m surgery run /place/runs/r --step "$step"; code=$?
if [[ $code -eq 75 ]]; then qrerun "$PBS_JOBID" || echo "jobs may not rerun themselves here: let resources.chain be 2 or more"; fi
exit "$code"
