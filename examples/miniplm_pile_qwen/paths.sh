# shellcheck shell=bash
# Where everything is and how steps are started: the only file to edit. Variables may also come from the environment.
#
#   ./1_tokenize.sh                       runs a step here, under torchrun with RANKS processes
#   ./submit.sh                           gives all steps to Slurm, each after those that it needs

CORPUS="${CORPUS:-data/pile/*.jsonl.zst}"            # documents with "text" and "meta": {"pile_set_name": …}
TEACHER="${TEACHER:-models/Qwen1.5-1.8B}"            # Hugging Face folder or checkpoint
TOKENIZER="${TOKENIZER:-$TEACHER}"                   # the teacher's: one vocabulary for all models
DATA="${DATA:-data/pile_qwen}"
RUNS="${RUNS:-runs/pile_qwen}"
SIZE="${SIZE:-500m}"                                 # 200m, 500m or 1.2b
PYTHON="${PYTHON:-python}"
RANKS="${RANKS:-8}"
TOKENIZE_OPTIONS="${TOKENIZE_OPTIONS:-}"             # more key=value arguments, for trial runs
TRAIN_OPTIONS="${TRAIN_OPTIONS:-}"
STUDENT_OPTIONS="${STUDENT_OPTIONS:-}"
SCORE_OPTIONS="${SCORE_OPTIONS:-}"
SBATCH_GPU="${SBATCH_GPU:---nodes=1 --gpus-per-node=8 --exclusive --mem=0}"   # a whole node: all cores and memory
SBATCH_CPU="${SBATCH_CPU:---nodes=1 --cpus-per-task=64}"
export PYTHON

# shellcheck disable=SC2034 # the steps read it
HERE="examples/miniplm_pile_qwen"
declare -gA JOBS

# run NAME "NAMES IT NEEDS" VERB ARGUMENT …: here, or with SUBMIT=1 as a Slurm job after the named ones.
run() {
    local name=$1 needs=$2 verb=$3 need dependency="" options=$SBATCH_GPU
    shift 3
    if [ -z "${SUBMIT:-}" ]; then
        case $verb in
            train | score_corpus | evaluate)
                "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$RANKS" "tools/$verb.py" "$@" ;;
            *) "$PYTHON" "tools/$verb.py" "$@" ;;
        esac
        return
    fi
    for need in $needs; do
        [ -z "${JOBS[$need]:-}" ] || dependency="$dependency:${JOBS[$need]}"
    done
    case $verb in
        tokenize_corpus | sample_by_difference | convert_to_hf) options="$SBATCH_CPU --export=ALL,GPUS=1" ;;
    esac
    # shellcheck disable=SC2086 # options are words
    JOBS[$name]=$(sbatch --parsable --job-name="$name" $options \
        ${dependency:+--dependency=afterok$dependency --kill-on-invalid-dep=yes} examples/slurm/run.sbatch "$verb" "$@")
    echo "$name: job ${JOBS[$name]}${dependency:+ after ${dependency#:}}"
}
