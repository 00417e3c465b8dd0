#!/bin/bash
# Figure 9 of the paper: difference-sampling ratios. All share one scoring; each ratio samples and trains.
#   RATIOS="0.3 0.4 0.5 0.6 0.7 0.9" SIZE=200m ./ratio.sh        (SUBMIT=1 gives everything to Slurm)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source examples/miniplm_pile_qwen/paths.sh
mkdir -p logs
for ratio in ${RATIOS:-0.3 0.4 0.5 0.6 0.7 0.9}; do
    run "sample_$ratio" "" sample_by_difference "ratio=$ratio" "data.path=$DATA/train" \
        "teacher_scores=$DATA/scores/teacher" "reference_scores=$DATA/scores/reference" "output=$DATA/sampled_$ratio"
    # shellcheck disable=SC2086
    run "ratio_$ratio" "sample_$ratio" train --config "$HERE/student_$SIZE.yaml" "data.path=$DATA/sampled_$ratio" \
        "data.eval_path=$DATA/heldout" "output=$RUNS/ratio_${SIZE}_$ratio" $TRAIN_OPTIONS $STUDENT_OPTIONS
done
