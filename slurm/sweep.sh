#!/usr/bin/env bash
# A run for each value of a key, as a job array, and then a job that compares them. On the login node:
#
#     bash slurm/sweep.sh prune.sparsity=0.8,0.9,0.95 jobs/mnist/job.yaml [KEY=VALUE]... [-- SBATCH FLAGS]
hpcprune=(hpcprune)
[ -z "${HPCPRUNE_SITE:-}" ] && [ ! -f slurm/site.sh ] || source "${HPCPRUNE_SITE:-slurm/site.sh}" || exit 1
exec "${hpcprune[@]}" submit --sweep "$@"
