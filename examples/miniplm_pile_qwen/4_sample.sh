#!/bin/bash
# The share of the corpus that the teacher finds most easier than the reference model does.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source examples/miniplm_pile_qwen/paths.sh

run sample "score_teacher score_reference" sample_by_difference --config "$HERE/sample_by_difference.yaml" \
    "data.path=$DATA/train" "teacher_scores=$DATA/scores/teacher" "reference_scores=$DATA/scores/reference" \
    "output=$DATA/sampled"
