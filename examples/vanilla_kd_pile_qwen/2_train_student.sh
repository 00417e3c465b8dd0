#!/bin/bash
# Train the student of SIZE with its teacher; started again, it resumes from its newest checkpoint.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source examples/vanilla_kd_pile_qwen/paths.sh

# shellcheck disable=SC2086
run "student_$SIZE" "tokenize" train --config "$HERE/student_$SIZE.yaml" "data.path=$DATA/train" \
    "data.eval_path=$DATA/heldout" "teacher.path=$TEACHER" "output=$RUNS/vanilla_kd_$SIZE" \
    $TRAIN_OPTIONS $STUDENT_OPTIONS
