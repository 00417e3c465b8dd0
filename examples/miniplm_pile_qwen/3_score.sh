#!/bin/bash
# Score every chunk under teacher and reference model: mean negative log-likelihood.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source examples/miniplm_pile_qwen/paths.sh

# shellcheck disable=SC2086
run score_teacher "tokenize" score_corpus "data.path=$DATA/train" "model.path=$TEACHER" \
    "output=$DATA/scores/teacher" $SCORE_OPTIONS
# shellcheck disable=SC2086
run score_reference "reference" score_corpus "data.path=$DATA/train" "model.path=$RUNS/reference" \
    "output=$DATA/scores/reference" $SCORE_OPTIONS
