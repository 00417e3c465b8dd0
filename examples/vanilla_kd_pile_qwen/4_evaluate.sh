#!/bin/bash
# Measure held-out loss and bits per byte; with TASKS=paper also the nine zero-shot tasks (needs the extra 'eval').
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source examples/vanilla_kd_pile_qwen/paths.sh

run "heldout_$SIZE" "student_$SIZE" evaluate "model.path=$RUNS/vanilla_kd_$SIZE" "data.path=$DATA/heldout" \
    "output=$RUNS/vanilla_kd_$SIZE/heldout.json"
if [ -n "${TASKS:-}" ]; then
    RANKS=1 GPUS=1 run "tasks_$SIZE" "export_$SIZE" evaluate "model.path=$RUNS/hf/vanilla_kd_$SIZE" \
        "harness.tasks=[$TASKS]" "output=$RUNS/vanilla_kd_$SIZE/tasks.json"
fi
