#!/bin/bash
# Documents to chunks of at most 1,025 ids, one domain per chunk; held-out and reference split by document.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source examples/miniplm_pile_qwen/paths.sh

# shellcheck disable=SC2086 # options are words; the corpus is a pattern
run tokenize "" tokenize_corpus --config "$HERE/tokenize_corpus.yaml" "input=[$CORPUS]" "tokenizer=$TOKENIZER" \
    "output=$DATA/train" "heldout_output=$DATA/heldout" "reference_output=$DATA/reference" $TOKENIZE_OPTIONS
