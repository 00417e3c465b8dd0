#!/bin/bash
# Keep the share of the corpus with the largest difference between reference and teacher loss.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source examples/miniplm_pile_qwen/paths.sh

run sample "score_teacher score_reference" sample_by_difference --config "$HERE/sample_by_difference.yaml" \
    "data.path=$DATA/train" "teacher_scores=$DATA/scores/teacher" "reference_scores=$DATA/scores/reference" \
    "output=$DATA/sampled"
