#!/bin/bash
# Figure 8 of the paper: plain pre-training of SIZE on the whole corpus, and the FLOPs with which every run of that size
# reaches its final held-out loss. Missing runs are left out.
#   SIZE=500m ./compute_saving.sh        (SUBMIT=1 gives the training to Slurm; READ=1 then reads its result)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source examples/miniplm_pile_qwen/paths.sh
mkdir -p logs
plain="$RUNS/pretrain_$SIZE"
if [ -z "${READ:-}" ]; then
    # shellcheck disable=SC2086
    run "pretrain_$SIZE" "" train --config "$HERE/student_$SIZE.yaml" "data.path=$DATA/train" \
        "data.eval_path=$DATA/heldout" "output=$plain" $TRAIN_OPTIONS $STUDENT_OPTIONS
fi
[ -z "${SUBMIT:-}" ] || exit 0
others=()
for folder in "$RUNS/miniplm_$SIZE" "$RUNS/vanilla_kd_$SIZE" "$RUNS"/{ratio,teacher,reference}_"${SIZE}"_*; do
    [ ! -f "$folder/metrics.jsonl" ] || others+=("$folder")
done
[ "${#others[@]}" -gt 0 ] || { echo "compute_saving.sh: no other run of $SIZE in $RUNS" >&2; exit 2; }
"$PYTHON" -m megatron_kd.evaluation.compute_saving "$plain" "${others[@]}"
