#!/bin/bash
# Figure 6 of the paper: the teacher that scores. TEACHERS is a list of Hugging Face folders or checkpoints.
#   TEACHERS="models/Qwen1.5-0.5B models/Qwen1.5-1.8B models/Qwen1.5-4B" SIZE=200m ./teacher_size.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source examples/miniplm_pile_qwen/paths.sh
mkdir -p logs
for teacher in ${TEACHERS:?a list of teachers, as above}; do
    name=$(basename "$teacher")
    # shellcheck disable=SC2086
    run "score_$name" "" score_corpus "data.path=$DATA/train" "model.path=$teacher" \
        "output=$DATA/scores/$name" $SCORE_OPTIONS
    run "sample_$name" "score_$name" sample_by_difference --config "$HERE/sample_by_difference.yaml" \
        "data.path=$DATA/train" "teacher_scores=$DATA/scores/$name" "reference_scores=$DATA/scores/reference" \
        "output=$DATA/sampled_$name"
    # shellcheck disable=SC2086
    run "teacher_$name" "sample_$name" train --config "$HERE/student_$SIZE.yaml" "data.path=$DATA/sampled_$name" \
        "data.eval_path=$DATA/heldout" "output=$RUNS/teacher_${SIZE}_$name" $TRAIN_OPTIONS $STUDENT_OPTIONS
done
