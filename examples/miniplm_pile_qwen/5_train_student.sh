#!/bin/bash
# Train the student of SIZE on the sampled corpus; started again, it resumes from its newest checkpoint.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source examples/miniplm_pile_qwen/paths.sh

# shellcheck disable=SC2086
run "student_$SIZE" "sample" train --config "$HERE/student_$SIZE.yaml" "data.path=$DATA/sampled" \
    "data.eval_path=$DATA/heldout" "output=$RUNS/miniplm_$SIZE" $TRAIN_OPTIONS $STUDENT_OPTIONS
