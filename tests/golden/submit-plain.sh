#!/usr/bin/env bash
# what it is
#SBATCH --job-name=x
#SBATCH --requeue
#SBATCH --nodes=4

set -- jobs/mnist/job.yaml
set -u
echo "$@"
