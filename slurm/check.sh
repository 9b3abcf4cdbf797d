#!/usr/bin/env bash
# Verify a run's folder, or any checkpoint, byte by byte; fails if something is wrong. After a run:
#
#     sbatch --dependency=afterok:JOB slurm/check.sh runs/mnist
#SBATCH --job-name=hpcprune-check
#SBATCH --output=hpcprune-check-%j.out
#SBATCH --ntasks=1
cd "$SLURM_SUBMIT_DIR" || exit 1
hpcprune=(hpcprune)
[ -z "${HPCPRUNE_SITE:-}" ] && [ ! -f slurm/site.sh ] || source "${HPCPRUNE_SITE:-slurm/site.sh}" || exit 1
exec "${hpcprune[@]}" check "$@"
