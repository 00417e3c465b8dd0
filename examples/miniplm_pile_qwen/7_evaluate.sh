#!/bin/bash
# Measure held-out loss and bits per byte; with TASKS=paper also the nine zero-shot tasks (needs the extra 'eval').
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source examples/miniplm_pile_qwen/paths.sh

run "heldout_$SIZE" "student_$SIZE" evaluate "model.path=$RUNS/miniplm_$SIZE" "data.path=$DATA/heldout" \
    "output=$RUNS/miniplm_$SIZE/heldout.json"
if [ -n "${TASKS:-}" ]; then
    RANKS=1 GPUS=1 run "tasks_$SIZE" "export_$SIZE" evaluate "model.path=$RUNS/hf/miniplm_$SIZE" \
        "harness.tasks=[$TASKS]" "output=$RUNS/miniplm_$SIZE/tasks.json"
fi
