#!/usr/bin/env bash
# what it is
#SBATCH --job-name=x
#SBATCH --requeue
#SBATCH --nodes=2 --array=0-2

set -- jobs/mnist/job.yaml
values=(0.8 0.9 0.95)
value=prune.sparsity=${values[$SLURM_ARRAY_TASK_ID]}
set -- "$@" "$value" --out runs/mnist-sweep/"$value"
set -u
echo "$@"
