#!/usr/bin/env bash
# The results of several runs side by side, in the log and on a page. After a sweep:
#
#     sbatch --dependency=afterany:JOB slurm/compare.sh runs/mnist-sweep --out runs/mnist-sweep/comparison.html
#SBATCH --job-name=hpcprune-compare
#SBATCH --output=hpcprune-compare-%j.out
#SBATCH --ntasks=1
cd "$SLURM_SUBMIT_DIR" || exit 1
hpcprune=(hpcprune)
[ -z "${HPCPRUNE_SITE:-}" ] && [ ! -f slurm/site.sh ] || source "${HPCPRUNE_SITE:-slurm/site.sh}" || exit 1
exec "${hpcprune[@]}" compare "$@"
