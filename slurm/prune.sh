#!/usr/bin/env bash
# One job file in, one checked checkpoint out, through time limits, preemption and dead nodes:
#
#     sbatch [-N 4 --ntasks-per-node=2 ...] slurm/prune.sh jobs/mnist/job.yaml [KEY=VALUE]...
#
# Ranks: one a GPU where GPUs are asked for (--gres=gpu:4), else as many as tasks, else one a core that Slurm gives.
#SBATCH --job-name=hpcprune
#SBATCH --output=hpcprune-%j.out --open-mode=append
#SBATCH --signal=B:USR1@120 --requeue
set -uo pipefail
cd "$SLURM_SUBMIT_DIR" || exit 1
hpcprune=(hpcprune)
[ -z "${HPCPRUNE_SITE:-}" ] && [ ! -f slurm/site.sh ] || source "${HPCPRUNE_SITE:-slurm/site.sh}" || exit 1
say() { echo "$(date +%FT%T) $SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0} $*"; }

per_node=${SLURM_GPUS_ON_NODE:-$((SLURM_CPUS_ON_NODE / ${SLURM_CPUS_PER_TASK:-1}))}
ranks=${SLURM_NTASKS:-$((per_node * SLURM_JOB_NUM_NODES))}
run=(srun --ntasks="$ranks" --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --cpu-bind=cores --label --kill-on-bad-exit=0 --wait=30)

# Told to stop, the ranks write a checkpoint and end with 75; those that do not listen yet, with 128 + the signal.
told= pid=
trap 'told=USR1; [ -z "$pid" ] || kill -USR1 $pid' USR1  # time is nearly up, or another job needs the nodes
trap 'told=TERM' TERM                                    # Slurm ends this job, and has told the ranks

find_mpi() {  # the first way to start MPI by which the ranks find each other
    for mpi in pmix pmi2 none; do
        srun --mpi=list 2>&1 | grep -qw $mpi && "${run[@]}" --mpi=$mpi "${hpcprune[@]}" doctor --launch && return
    done
    [ -n "$told" ] || say "the ranks do not find each other under any --mpi that Slurm has; see above"
    return 1
}
find_mpi; status=$?
if [ $status = 0 ] && [ -z "$told" ]; then
    say "$ranks ranks on $SLURM_JOB_NODELIST, by --mpi=$mpi, the first by which they find each other"
    "${run[@]}" --mpi=$mpi "${hpcprune[@]}" run "$@" & pid=$!
    [ -z "$told" ] || kill -USR1 $pid
    while kill -0 $pid 2>/dev/null; do wait $pid; status=$?; done  # a signal ends a wait early
    [ $status = 0 ] && exit 0
fi

silent=$(for node in $(scontrol show hostnames "$SLURM_JOB_NODELIST"); do
    timeout 20 srun --nodes=1 --ntasks=1 --nodelist="$node" --overlap --mpi=none true 2>/dev/null || echo "$node" &
done; wait)
case $told,$status,$silent in
    TERM,*) say "ended with $status after SIGTERM"; exit $status ;;
    *,75,* | USR1,0,* | USR1,138,* | ,143,*) why="told to stop" ;;
    *,) say "ended with $status"; exit $status ;;
    *) why="no answer from $(echo $silent)" ;;
esac
if [ "${SLURM_RESTART_COUNT:-0}" -ge "${HPCPRUNE_RESTARTS:-20}" ]; then
    say "$why, and not requeued: that was start $((SLURM_RESTART_COUNT + 1)); sbatch the same again to go on"
    exit 1
fi
say "$why; requeued, to go on from the newest checkpoint"
scontrol requeue "$SLURM_JOB_ID" && sleep 120  # in which Slurm ends this script
