#!/bin/bash
# Two nodes with eight GPUs each: sbatch slurm.sh DATA RUN
# DATA and RUN are folders that both nodes see. The same command goes on with a training that was ended.
#SBATCH --job-name=deqdet
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=40
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --output=%x-%j.out
set -euo pipefail

data=${1:?folder of the data set}
run=${2:?folder to write}
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export OMP_NUM_THREADS=4
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # or workers that start again may hang: PyTorch's issue 135712

srun --kill-on-bad-exit=1 torchrun \
    --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node 8 --max-restarts 3 \
    --rdzv-backend c10d --rdzv-endpoint "$first:29500" --rdzv-id "$SLURM_JOB_ID" \
    --no-python deqdet_train "$data" --out "$run" --resume --workers 4
