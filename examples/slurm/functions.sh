# shellcheck shell=bash
# Sourced by the sbatch files: one torchrun agent on every node of the job, and a requeue when time runs out.
#
#   PYTHON     the interpreter with megatron_kd's requirements (default: .venv/bin/python of the working directory)
#   CONTAINER  an image for pyxis (srun --container-image); empty runs on the nodes themselves
#   GPUS       processes a node (default: SLURM_GPUS_ON_NODE, or 1 where there are none)

PYTHON="${PYTHON:-$PWD/.venv/bin/python}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" PYTHONUNBUFFERED=1

# The first node's address, and a port that no other job of this node is likely to have.
rendezvous() {
    MASTER_ADDR=$(scontrol show hostnames "${SLURM_JOB_NODELIST_HET_GROUP_0:-$SLURM_JOB_NODELIST}" | head -n 1)
    MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
    export MASTER_ADDR MASTER_PORT
}

# Slurm warns the batch shell (#SBATCH --signal=B:USR1@…). The ranks get the signal, write a checkpoint and leave with
# status 75; torchrun inherits the signal ignored, so it stays until they are done. Then the job goes back to the queue.
WARNED=0
warn_ranks() {
    WARNED=1
    echo "$(date -Is) told to stop: the ranks write a checkpoint"
    scancel --signal=USR1 "$SLURM_JOB_ID" || true
}

# on_every_node [SRUN_OPTION …] -- PROGRAM ARGUMENT …: PROGRAM under torchrun; returns its status.
on_every_node() {
    local options=() status=0
    while [ "$1" != -- ]; do options+=("$1"); shift; done
    shift
    rendezvous
    [ -z "${CONTAINER:-}" ] || options+=(--container-image="$CONTAINER" --container-mounts="$PWD:$PWD")
    trap warn_ranks USR1
    (
        trap '' USR1
        # shellcheck disable=SC2016 # the node's own variables
        exec srun --kill-on-bad-exit=0 "${options[@]}" bash -c '
            trap "" USR1
            exec "$0" -m torch.distributed.run \
                --nnodes "$SLURM_NTASKS" --node-rank "$SLURM_PROCID" \
                --nproc-per-node "${GPUS:-${SLURM_GPUS_ON_NODE:-1}}" \
                --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT" "$@"' "$PYTHON" "$@"
    ) &
    local steps=$!
    while true; do  # a signal ends one wait, not the job
        status=0
        wait "$steps" || status=$?
        kill -0 "$steps" 2>/dev/null || break
    done
    return "$status"
}

# Preemption with a grace time: Slurm sends SIGTERM to the ranks, which save and leave, and not to the batch shell. The
# job would count as failed then.
preempted() {
    [[ "$(scontrol show job "$SLURM_JOB_ID")" == *PreemptTime=[0-9]* ]]
}

# Back to the queue after a warning; the same job goes on from its newest checkpoint. Otherwise the status of the run.
finish() {
    if [ "$1" -ne 0 ] && { [ "$WARNED" -eq 1 ] || preempted; }; then
        echo "$(date -Is) requeued"
        scontrol requeue "$SLURM_JOB_ID"
        sleep 60  # Slurm ends this shell
    fi
    exit "$1"
}
