"""``plan_run``: what a run will need and cost, before anything is started.

    python tools/plan_run.py --config examples/miniplm_pile_qwen/student_500m.yaml [plan.num_gpus=64 plan.gpu=h100 …]

Reads a training configuration (keys that only training knows are passed over) and its ``plan.*`` keys; prints a
table, and writes JSON where ``plan.output`` names a file. Imports neither torch nor Megatron-Core: the answer is there
at once, on any machine.
"""

import json
import sys
from pathlib import Path

from megatron_kd.planning.config import PlanRunConfig
from megatron_kd.planning.plan import Plan, make_plan
from megatron_kd.planning.plan_table import plan_text

__all__ = ["PlanRunConfig", "run"]


def run(config: PlanRunConfig) -> Plan:
    """Plan, print, and write the JSON file if one is asked for."""
    plan = make_plan(config)
    sys.stdout.write(plan_text(plan))
    if config.plan.output is not None:
        path = Path(config.plan.output)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(plan.as_dict(), indent=2) + "\n", encoding="utf-8")
        sys.stdout.write(f"\n{path}\n")
    return plan
