#!/usr/bin/env bash
# One job file in, one checked checkpoint out, through time limits, preemption and dead nodes:
#
#     sbatch [-N 4 --ntasks-per-node=2 ...] slurm/prune.sh jobs/mnist/job.yaml [KEY=VALUE]...
#
# Ranks: as many as tasks, else one a GPU where GPUs are asked for (--gres=gpu:4), else one a CPU that Slurm gives.
#SBATCH --job-name=hpcprune
#SBATCH --output=hpcprune-%j.out --open-mode=append
#SBATCH --signal=B:USR1@120 --requeue
cd "$SLURM_SUBMIT_DIR" || exit 1
hpcprune=(hpcprune)
[ -z "${HPCPRUNE_SITE:-}" ] && [ ! -f slurm/site.sh ] || source "${HPCPRUNE_SITE:-slurm/site.sh}" || exit 1
set -u
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID} job=${job:-$SLURM_JOB_ID}
say() { echo "$(date +%FT%T) $job.${SLURM_RESTART_COUNT:-0} $*"; }
left=$((${HPCPRUNE_RESTARTS:-20} - ${SLURM_RESTART_COUNT:-0}))
[ $left -ge 0 ] || { say "no start of HPCPRUNE_RESTARTS is left; sbatch the same again to go on"; exit 1; }

cpus=$(tr , '\n' <<< "$SLURM_JOB_CPUS_PER_NODE" | sed 's/(.*//' | sort -n | head -1)  # of the node that has the fewest
ranks=${SLURM_NTASKS:-$((${SLURM_GPUS_ON_NODE:-$((cpus / ${SLURM_CPUS_PER_TASK:-1}))} * SLURM_JOB_NUM_NODES))}
per_node=$(((ranks + SLURM_JOB_NUM_NODES - 1) / SLURM_JOB_NUM_NODES))
each=${SLURM_CPUS_PER_TASK:-$((per_node < cpus ? cpus / per_node : 1))}
run=(srun --export=ALL --ntasks="$ranks" --cpus-per-task="$each" --cpu-bind=cores --label --kill-on-bad-exit=0 --wait=30)
[ $((per_node * each)) -le "$cpus" ] || run+=(--overcommit)  # as when GPUs were asked for and no CPUs

told=
trap 'told=USR1' USR1  # time is nearly up, or another job needs the nodes
trap 'told=TERM' TERM  # Slurm ends this job
attend() {  # run a command whose ranks are told to stop when this script is; its exit status
    "$@" & pid=$!
    while kill -0 $pid 2>/dev/null; do
        if [ -z "$told" ]; then wait $pid; else scancel --quiet --signal=TERM "$job"; sleep 2; fi
    done
    wait $pid
}

known=$(srun --mpi=list 2>&1) status=1
for mpi in pmix pmi2 none; do  # the first by which the ranks find each other
    [ -z "$told" ] && grep -qw $mpi <<< "$known" || continue
    attend timeout -k 10 120 "${run[@]}" --mpi=$mpi "${hpcprune[@]}" doctor --launch && status=0 && break
done
if [ -n "$told" ]; then
    status=75
elif [ $status != 0 ]; then
    say "the ranks do not find each other under any --mpi that Slurm has; see above"
else
    say "$ranks ranks on $SLURM_JOB_NODELIST, by --mpi=$mpi, the first by which they find each other"
    attend "${run[@]}" --mpi=$mpi "${hpcprune[@]}" run "$@"; status=$?
    [ $status = 0 ] && exit 0
fi

# 75: told to stop, and the checkpoint is complete. 143: told before it could listen; or a rank died and the others were
# ended for it. Anything else is an error, unless a node does not answer any more.
over() { say "ended with $status${told:+ after SIG$told}"; exit $status; }
preempted() { scontrol show job "$SLURM_JOB_ID" | grep -q 'PreemptTime=[0-9]'; }
[ "$told" != TERM ] || over
silent=
if [ $status = 75 ] || { [ $status = 143 ] && { [ -n "$told" ] || preempted; }; }; then
    why="told to stop"
else
    silent=$(for node in $(scontrol show hostnames "$SLURM_JOB_NODELIST"); do
        env -i PATH="$PATH" ${SLURM_CONF:+SLURM_CONF="$SLURM_CONF"} timeout -k 5 20 srun --jobid="$SLURM_JOB_ID" --overlap \
            --nodes=1 --ntasks=1 --nodelist="$node" --mpi=none true 2>/dev/null || echo "$node" &
    done; wait)
    grep -qx "$SLURMD_NODENAME" <<< "$silent" && silent=  # this very node: it is the question that fails
    [ -n "$silent" ] || over
    why="no answer from $(echo $silent)"
fi
[ $left -gt 0 ] || { say "$why, and not requeued: HPCPRUNE_RESTARTS is reached; sbatch the same again to go on"; exit 1; }
# Requeued before Slurm has given the node up, a job with --exclusive may never be started again (22.05: BadConstraints).
[ -z "$silent" ] || { say "$why; Slurm requeues this job when it gives that up"; sleep 600; }
say "$why; requeuing, to go on from the newest checkpoint"
scontrol requeue "$job" && sleep 120  # in which Slurm ends this script
exit 1
