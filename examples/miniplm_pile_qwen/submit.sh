#!/bin/bash
# Submit every step as a Slurm job, each after those that it needs: ./submit.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
mkdir -p logs
export SUBMIT=1
for step in examples/miniplm_pile_qwen/[1-7]_*.sh; do
    # shellcheck disable=SC1090
    source "$step"
done
