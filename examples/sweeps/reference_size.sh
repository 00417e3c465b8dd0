#!/bin/bash
# Table 11 of the paper: the reference model's size. Each size trains, scores, samples and trains a student.
#   REFERENCES="qwen_104m qwen_200m qwen_500m" SIZE=200m ./reference_size.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source examples/miniplm_pile_qwen/paths.sh
mkdir -p logs
for name in ${REFERENCES:-qwen_104m qwen_200m qwen_500m}; do
    # shellcheck disable=SC2086
    run "reference_$name" "" train --config "$HERE/reference.yaml" "model.name=$name" "data.path=$DATA/reference" \
        "data.eval_path=$DATA/heldout" "output=$RUNS/reference_$name" $TRAIN_OPTIONS
    # shellcheck disable=SC2086
    run "score_$name" "reference_$name" score_corpus "data.path=$DATA/train" "model.path=$RUNS/reference_$name" \
        "output=$DATA/scores/reference_$name" $SCORE_OPTIONS
    run "sample_$name" "score_$name" sample_by_difference --config "$HERE/sample_by_difference.yaml" \
        "data.path=$DATA/train" "teacher_scores=$DATA/scores/teacher" \
        "reference_scores=$DATA/scores/reference_$name" "output=$DATA/sampled_reference_$name"
    # shellcheck disable=SC2086
    run "student_$name" "sample_$name" train --config "$HERE/student_$SIZE.yaml" \
        "data.path=$DATA/sampled_reference_$name" "data.eval_path=$DATA/heldout" \
        "output=$RUNS/reference_${SIZE}_$name" $TRAIN_OPTIONS $STUDENT_OPTIONS
done
