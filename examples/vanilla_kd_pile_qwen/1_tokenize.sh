#!/bin/bash
# Tokenize the corpus of examples/miniplm_pile_qwen, unless that example has done it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source examples/vanilla_kd_pile_qwen/paths.sh

if [ -e "$DATA/train/manifest.json" ]; then
    echo "$DATA/train exists"
else
    # shellcheck source=examples/miniplm_pile_qwen/1_tokenize.sh
    source examples/miniplm_pile_qwen/1_tokenize.sh
    HERE="examples/vanilla_kd_pile_qwen"
fi
