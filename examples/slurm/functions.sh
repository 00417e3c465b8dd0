# shellcheck shell=bash
# Sourced by the sbatch files: one torchrun agent on every node of the job, and a requeue when time runs out.
#
#   PYTHON     the interpreter with megatron_kd's requirements (default: .venv/bin/python of the working directory, or
#              the image's own where there is a CONTAINER)
#   CONTAINER  an image for pyxis (srun --container-image); empty runs on the nodes themselves
#   MOUNTS     mounts of the container besides the working directory, in pyxis syntax: /data:/data,/models:/models
#   GPUS       processes per node (default: SLURM_GPUS_ON_NODE, or 1 without GPUs)

PYTHON="${PYTHON:-${CONTAINER:+python}}"
PYTHON="${PYTHON:-$PWD/.venv/bin/python}"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" PYTHONUNBUFFERED=1

JOB="${SLURM_JOB_ID:-}" # the job for scancel and scontrol; array.sbatch overrides it

STEP=(--kill-on-bad-exit=0 --wait=300) # five minutes for the other nodes after the first has ended
if [ -n "${SLURM_CPUS_PER_TASK:-}" ] && [ -z "${SLURM_HET_SIZE:-}" ]; then # srun does not inherit it from sbatch
    STEP+=(--cpus-per-task="$SLURM_CPUS_PER_TASK")
fi
if [ -n "${CONTAINER:-}" ]; then
    STEP+=(--container-image="$CONTAINER" --container-workdir="$PWD")
    STEP+=(--container-mounts="$PWD:$PWD${MOUNTS:+,$MOUNTS}")
fi

# The first node's address, and a port below the ephemeral range that other jobs of the node are unlikely to use.
rendezvous() {
    MASTER_ADDR=$(scontrol show hostnames "${SLURM_JOB_NODELIST_HET_GROUP_0:-$SLURM_JOB_NODELIST}" | head -n 1)
    MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000))
    export MASTER_ADDR MASTER_PORT
}

# Slurm warns the batch shell (#SBATCH --signal=B:USR1@…). The ranks of train get the signal, write a checkpoint and
# exit with status 75; torchrun inherits the signal as ignored, so it stays until they are done. Other verbs are
# terminated; started again, they resume from what is on disk. Then the job is requeued.
WARNED=0
WARNING=TERM
warn_ranks() {
    WARNED=1
    echo "$(date -Is) told to stop: $WARNING to the ranks"
    scancel --signal="$WARNING" "$JOB" || true
}

# supervised PROGRAM COMMAND …: runs the command, which runs PROGRAM, and returns its status despite any signals.
supervised() {
    local status steps
    case $1 in tools/train.py) WARNING=USR1 ;; esac
    shift
    trap warn_ranks USR1
    (
        trap '' USR1
        exec "$@"
    ) &
    steps=$!
    while true; do # a signal interrupts wait, not the job
        status=0
        wait "$steps" || status=$?
        kill -0 "$steps" 2>/dev/null || break
    done
    return "$status"
}

# on_every_node [SRUN_OPTION …] -- PROGRAM ARGUMENT …: PROGRAM under torchrun.
on_every_node() {
    local options=()
    while [ "$1" != -- ]; do
        options+=("$1")
        shift
    done
    shift
    rendezvous
    # shellcheck disable=SC2016 # variables of the node
    supervised "$1" srun "${STEP[@]}" "${options[@]}" bash -c '
        trap "" USR1
        exec "$0" -m torch.distributed.run \
            --nnodes "$SLURM_NTASKS" --node-rank "$SLURM_PROCID" \
            --nproc-per-node "${GPUS:-${SLURM_GPUS_ON_NODE:-1}}" \
            --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT" "$@"' "$PYTHON" "$@"
}

# in_one_process PROGRAM ARGUMENT …: PROGRAM without torchrun.
in_one_process() {
    supervised "$1" srun --ntasks=1 "${STEP[@]}" "$PYTHON" "$@"
}

# Preemption with a grace time: Slurm sends SIGTERM to the ranks, which save and exit, but not to the batch shell, so
# the job would count as failed. A preemption of an earlier start does not count.
preempted() {
    local record started
    record=$(scontrol show job "$JOB")
    [[ $record =~ StartTime=([0-9T:-]+) ]] || return 1
    started=${BASH_REMATCH[1]}
    [[ $record =~ PreemptTime=([0-9T:-]+) && ! ${BASH_REMATCH[1]} < $started ]]
}

# Requeue after a warning: the same job resumes from its newest checkpoint. Otherwise exit with the run's status.
finish() {
    if [ "$1" -ne 0 ] && { [ "$WARNED" -eq 1 ] || preempted; }; then
        echo "$(date -Is) requeued"
        scontrol requeue "$JOB"
        sleep 60 # Slurm ends this shell
    fi
    exit "$1"
}
