#!/bin/bash
# Export a Hugging Face folder and compare its logits with Megatron-Core's.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source examples/vanilla_kd_pile_qwen/paths.sh

run "export_$SIZE" "student_$SIZE" convert_to_hf "input=$RUNS/vanilla_kd_$SIZE" "output=$RUNS/hf/vanilla_kd_$SIZE"
