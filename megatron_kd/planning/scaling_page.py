"""``docs/scaling.md`` from ``plan_run``: what 50B tokens cost at 8, 64 and 512 GPUs.

python -m megatron_kd.planning.scaling_page > docs/scaling.md
"""

import sys
from pathlib import Path

from megatron_kd.config import load_config
from megatron_kd.costs.gpus import GIB
from megatron_kd.planning.plan import Plan, make_plan
from megatron_kd.planning.plan_config import PlanRunConfig
from megatron_kd.planning.plan_run import amount

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
WORLDS = {8: 8, 64: 8, 512: 1}
"""GPUs and the micro-batch with which 512 sequences divide over them."""
RUNS = (
    ("Vanilla KD", "vanilla_kd_pile_qwen/student_500m.yaml", ("training.train_iters=100000",)),
    ("Vanilla KD, FLOP-matched", "vanilla_kd_pile_qwen/student_500m.yaml", ()),
    ("MiniPLM", "miniplm_pile_qwen/student_500m.yaml", ()),
)
MFU = 0.4


def plan_of(file: str, gpus: int, overrides: tuple[str, ...]) -> Plan:
    """The plan of an example on ``gpus`` H100."""
    keys = [f"plan.num_gpus={gpus}", f"training.micro_batch_size={WORLDS[gpus]}", f"plan.mfu={MFU}", *overrides]
    return make_plan(load_config(PlanRunConfig, EXAMPLES / file, keys))


def page() -> str:
    """The whole page."""
    rows = [_row(name, gpus, plan_of(file, gpus, overrides)) for name, file, overrides in RUNS for gpus in WORLDS]
    miniplm = plan_of(RUNS[2][1], 8, ())
    offline = [
        f"| {cost.what.removeprefix('offline: ')} | {cost.flops:.3g} | {cost.gpu_hours:,.0f} |"
        for cost in miniplm.costs
        if cost.what.startswith("offline")
    ]
    caches = [f"| {cache.name} | {cache.bytes_per_token:,.0f} | {amount(cache.total)} |" for cache in miniplm.caches]
    return _PAGE.format(
        mfu=f"{MFU:.0%}",
        rows="\n".join(rows),
        offline="\n".join(offline),
        caches="\n".join(caches),
        corpus=amount(miniplm.corpus_bytes),
        sampled=amount(miniplm.sampled_bytes),
    )


def _row(name: str, gpus: int, plan: Plan) -> str:
    training, best = plan.costs[0], plan.recommendation.candidate
    slower = best.seconds / best.compute_seconds
    return (
        f"| {name} | {plan.assumptions['train_iters']:,} | {gpus} | {best.layout.describe()}, micro-batch "
        f"{best.micro_batch_size} | {best.memory.total / GIB:.1f} | {training.flops:.3g} | {training.hours:.3g} | "
        f"{training.gpu_hours:,.0f} | {training.hours * slower:.3g} | {MFU / slower:.0%} |"
    )


_PAGE = """# What a run costs

Written by `python -m megatron_kd.planning.scaling_page > docs/scaling.md` from `plan_run`; a test keeps it so. All of
it is arithmetic: no run of this size has been measured here.

A 500M student of a 1.8B teacher, 512 x 1,024 tokens a step, bf16, H100 SXM 80 GB. *Steps* of 100,000 are 52.4B tokens;
the FLOP-matched run has the paper's 45,000.

| run | steps | GPUs | layout | GiB a GPU | FLOPs | hours | GPU-hours | with communication | MFU in effect |
|---|--:|--:|---|--:|--:|--:|--:|--:|--:|
{rows}

What was assumed:

- **MFU {mfu}** of 989.5 dense bf16 TFLOP/s, the teacher's forward pass counted. *Hours* follow from that alone.
- *With communication* adds what the recommended layout cannot hide: the pipeline's bubble, tensor-parallel
  reductions, and the part of the gradients' reduction that takes longer than the last micro-batch's work, at 450 GB/s
  inside a node of 8 and 50 GB/s a GPU between nodes. At 512 GPUs data parallelism alone leaves one sequence a GPU, and
  the reduction takes longer than the work; tensor parallelism, whose reductions stay inside a node, is the better of
  two poor choices. A batch of 512 sequences is small for that many GPUs.
- FLOPs are 2 a parameter and token forward and 6 forward and backward, all parameters counted, attention's quadratic
  term left out (`megatron_kd/costs/flops.py`).
- Memory is that of `megatron_kd/costs/memory.py`, which tests compare with the tensors of real steps on a CPU; no
  recomputation, nothing for the CUDA context, of which 10% of the GPU is kept free.

## Once, before MiniPLM's students

| | FLOPs | GPU-hours |
|---|--:|--:|
{offline}

Every student that is trained on the sampled corpus shares this. The corpus of 100B tokens takes {corpus}, its sampled
half {sampled}.

## A cache instead of a teacher

| knowledge | bytes a token | 52.4B tokens |
|---|--:|--:|
{caches}
"""


if __name__ == "__main__":
    sys.stdout.write(page())
