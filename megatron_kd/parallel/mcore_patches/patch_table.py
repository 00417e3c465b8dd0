"""Everything in Megatron-Core that this project works around: what is wrong, in which versions, where it is remedied.

``tests/distributed/parallel/test_patch_table.py`` has one check per entry, which fails as soon as the installed
Megatron-Core no longer has the fault: the entry and its remedy can then go once no supported version has it.
``docs/architecture.md`` holds the table that this prints:

    python -m megatron_kd.parallel.mcore_patches.patch_table
"""

import sys
from dataclasses import dataclass
from typing import Literal

TESTED_VERSIONS = ("0.16.1", "0.19.2")
Effect = Literal["error", "silently wrong", "slow", "memory", "interface"]
_HERE = "parallel/mcore_patches"


@dataclass(frozen=True)
class Patch:
    """One fault of Megatron-Core and its remedy.

    Attributes:
        fault: what is wrong.
        effect: what it leads to; ``interface`` is a difference between versions that is no fault.
        remedy: where the project works around it, ``file.py: name``.
        fixed_in: the first tested version without it; None means that the newest still has it.
    """

    fault: str
    effect: Effect
    remedy: str
    fixed_in: str | None = None

    @property
    def versions(self) -> tuple[str, ...]:
        """Tested versions that have the fault."""
        end = TESTED_VERSIONS.index(self.fixed_in) if self.fixed_in else len(TESTED_VERSIONS)
        return TESTED_VERSIONS[:end]


PATCHES: dict[str, Patch] = {
    "cuda": Patch(
        'Assumes CUDA: current device, streams, `device="cuda"`, random state, names of tensor types',
        "error",
        f"{_HERE}/cpu_backend.py: install",
    ),
    "one_rank_collectives": Patch(
        "Runs collectives over groups of one rank, which gloo hands to threads of its own",
        "slow",
        f"{_HERE}/cpu_backend.py: _skip_collectives_of_one_rank",
    ),
    "interleaved_p2p": Patch(
        "Interleaved pipelines with the default point-to-point calls train on wrong gradients",
        "silently wrong",
        f"{_HERE}/remedies.py: pipeline_communication",
    ),
    "tied_output_replica": Patch(
        "The tied output layer of a pipeline's last stage asks global state which data-parallel replica it is",
        "error",
        f"{_HERE}/remedies.py: replica_of_tied_output_layer",
    ),
    "sequence_parallel_workspace": Patch(
        "Linear layers gather sequence-parallel inputs into a buffer of global state, which explicit groups do "
        "not create",
        "error",
        f"{_HERE}/remedies.py: ensure_sequence_parallel_workspace",
    ),
    "sharding_attributes": Patch(
        "Weights that Megatron-Core does not initialise are not marked as shards: gradient norms count them wrong",
        "silently wrong",
        f"{_HERE}/remedies.py: mark_sharded_weights",
        fixed_in="0.19.2",
    ),
    "llama3_rope_bounds": Patch(
        "Llama 3.1's rotary scaling has fixed bounds; config.json gives them",
        "silently wrong",
        f"{_HERE}/remedies.py: scale_rotary",
    ),
    "unfused_rotary": Patch(
        "Rotary embedding without Transformer Engine reads its input a dozen times",
        "slow",
        f"{_HERE}/remedies.py: use_rotary_kernel",
    ),
    "unfused_swiglu": Patch(
        "SwiGLU without Transformer Engine adds an offset of zero in a pass of its own and copies its halves",
        "slow",
        "models/local_modules.py: SwiGLU",
    ),
    "norm_sequence_parallel": Patch(
        "The local layer spec's norm refuses sequence parallelism",
        "error",
        "models/local_modules.py: RMSNorm",
    ),
    "attention_workspace": Patch(
        "The local layer spec's attention takes its workspace from global state, holds all scores and refuses context "
        "parallelism",
        "error",
        "models/attention.py: SDPACoreAttention",
    ),
    "mlp_spec": Patch(
        "The layer spec holds the MLP as a `ModuleSpec`, from 0.19 on as a partial function",
        "interface",
        "models/layer_specs.py: _mlp_submodules",
        fixed_in="0.19.2",
    ),
    "adam_fresh_state": Patch(
        "The state dict of torch's AdamW asserts before its first step",
        "error",
        f"{_HERE}/remedies.py: make_torch_adam_checkpointable",
    ),
    "adam_missing_step": Patch(
        "Loading torch's AdamW asks every parameter's state for a step count that the format does not store",
        "error",
        f"{_HERE}/remedies.py: make_torch_adam_checkpointable",
    ),
    "adam_shared_step": Patch(
        "After loading, all parameters of torch's AdamW share one step count, which then advances once per parameter",
        "silently wrong",
        f"{_HERE}/remedies.py: make_torch_adam_checkpointable",
    ),
    "bucket_padding": Patch(
        "A checkpoint's optimizer state leaves out the padding between buckets and then cuts parameters out at their "
        "padded places: behind a padded bucket a parameter is saved with a part of its neighbour's moments",
        "silently wrong",
        f"{_HERE}/remedies.py: save_state_at_its_place",
    ),
    "weight_decay_multiplier": Patch(
        "`wd_mult` takes effect in Megatron-Core's own scheduler only",
        "silently wrong",
        f"{_HERE}/remedies.py: patch_optimizer",
    ),
    "unfused_adam": Patch(
        "torch's AdamW is built without its fused kernel",
        "slow",
        f"{_HERE}/remedies.py: use_fused_kernel",
    ),
    "scaled_gradient_copies": Patch(
        "Clipping without Transformer Engine and Apex makes a scaled copy of every gradient",
        "slow",
        f"{_HERE}/remedies.py: clipped_step",
    ),
    "overlapped_gather": Patch(
        "Under overlapped parameter gathering a rank holds only its own part of an update until the next forward pass",
        "silently wrong",
        f"{_HERE}/remedies.py: gather_parameters",
    ),
    "world_collectives": Patch(
        "Building an optimizer is collective over the whole world: ranks of a teacher would have to take part",
        "error",
        "parallel/runtime.py: join_split_world",
    ),
    "save_in_memory": Patch(
        "A save loads everything that a rank writes into memory (0.16 also hands it to forked processes, and waits for "
        "ever for one that is killed)",
        "memory",
        "checkpoints/sharded_save.py: ShardedSave",
    ),
    "inference_mode": Patch(
        "Decoding with a static cache needs `InferenceMode.active()`, which 0.16 does not have",
        "interface",
        "generation/decoder.py: InferenceMode",
        fixed_in="0.19.2",
    ),
}


def as_markdown() -> str:
    """Return the table of ``docs/architecture.md``."""
    rows = ["| what Megatron-Core does | effect | versions | remedy |", "|---|---|---|---|"]
    rows += [
        f"| {patch.fault} | {patch.effect} | {', '.join(patch.versions)} | `{patch.remedy.replace(': ', '`, `')}` |"
        for patch in PATCHES.values()
    ]
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    sys.stdout.write(as_markdown())
