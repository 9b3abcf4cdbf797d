#!/usr/bin/env bash
# what it is
#SBATCH --job-name=x
#SBATCH --requeue
#SBATCH --ntasks-per-node=2 '--comment=it'"'"'s mine' --mem 4G

set -- 'my jobs/job.yaml' prune.sparsity=0.9 'retrain.top_k={share: 0.01}'
set -u
echo "$@"
