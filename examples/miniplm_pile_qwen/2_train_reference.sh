#!/bin/bash
# Train the reference model, 104M, on its own 5B tokens.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source examples/miniplm_pile_qwen/paths.sh

# shellcheck disable=SC2086
run reference "tokenize" train --config "$HERE/reference.yaml" "data.path=$DATA/reference" \
    "data.eval_path=$DATA/heldout" "output=$RUNS/reference" $TRAIN_OPTIONS ${REFERENCE_OPTIONS:-}
