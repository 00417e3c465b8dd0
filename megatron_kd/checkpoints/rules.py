"""The rule types that map one family's Hugging Face tensors to Megatron-Core's, in both directions.

The table of rules is in ``decoder.py``. A rule names one mcore tensor and the HF tensors that hold the same
numbers; ``{layer}`` in a name stands for every layer. Shapes: h hidden, f ffn, d head width, a attention heads,
g query groups, V the vocabulary without padding.

    Rename        one tensor, another name
    MergeQKV      q [a·d, …], k [g·d, …], v [g·d, …]  ↔  [g · (a/g + 2) · d, …], per group: its q heads, k, v
    MergeGateUp   gate [f, h], up [f, h]              ↔  [2f, h], gate above up
    Vocabulary    [V, h]                              ↔  [padded V, h], zeros below

All functions are pure and copy no more than they must; the dtype stays what it is.

The mapping table of Llama-like decoders: which mcore tensor holds which Hugging Face tensors.

Qwen1.5, Qwen2, Qwen2.5, Qwen3, Llama and Mistral have the same tensors under the same names; they differ in a bias on
Q, K and V, norms on Q and K, and whether the output layer is the embedding: ``families.py`` reads it from config.json.
"""

from dataclasses import dataclass
from typing import Any, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from megatron_kd.errors import CheckpointError
from megatron_kd.models.architecture import ModelArchitecture


@dataclass(frozen=True)
class Rename:
    """The same tensor under two names."""

    mcore: str
    hf: tuple[str, ...]

    def to_hf(self, tensor: Tensor, architecture: ModelArchitecture) -> tuple[Tensor, ...]:
        """mcore's tensor to HF's, in the order of ``hf``."""
        return (tensor,)

    def to_mcore(self, tensors: Sequence[Tensor], architecture: ModelArchitecture, vocab_rows: int) -> Tensor:
        """HF's tensors, in the order of ``hf``, to mcore's."""
        return tensors[0]


class MergeQKV(Rename):
    """Three projections to one whose rows are interleaved by query group, so that TP shards whole groups."""

    def to_hf(self, tensor: Tensor, architecture: ModelArchitecture) -> tuple[Tensor, ...]:
        heads = architecture.num_attention_heads // architecture.num_query_groups
        trailing = tensor.shape[1:]
        groups = tensor.reshape(architecture.num_query_groups, heads + 2, architecture.head_dim, *trailing)
        q, k, v = groups[:, :heads], groups[:, heads], groups[:, heads + 1]
        return tuple(part.reshape(-1, *trailing).contiguous() for part in (q, k, v))

    def to_mcore(self, tensors: Sequence[Tensor], architecture: ModelArchitecture, vocab_rows: int) -> Tensor:
        trailing = tensors[0].shape[1:]
        groups, heads = architecture.num_query_groups, architecture.num_attention_heads // architecture.num_query_groups
        shapes = [(groups, count, architecture.head_dim, *trailing) for count in (heads, 1, 1)]
        parts = [part.reshape(shape) for part, shape in zip(tensors, shapes, strict=True)]
        return torch.cat(parts, dim=1).reshape(-1, *trailing)


class MergeGateUp(Rename):
    """SwiGLU's two input projections to one."""

    def to_hf(self, tensor: Tensor, architecture: ModelArchitecture) -> tuple[Tensor, ...]:
        return tuple(part.contiguous() for part in tensor.chunk(2, dim=0))

    def to_mcore(self, tensors: Sequence[Tensor], architecture: ModelArchitecture, vocab_rows: int) -> Tensor:
        if tensors[0].shape != tensors[1].shape:
            raise RuntimeError(f"shape {list(tensors[0].shape)} beside {list(tensors[1].shape)}")
        return torch.cat(list(tensors), dim=0)


class Vocabulary(Rename):
    """Rows per vocabulary id: mcore pads them to a multiple, HF holds as many as there are."""

    def to_hf(self, tensor: Tensor, architecture: ModelArchitecture) -> tuple[Tensor, ...]:
        return (tensor[: architecture.vocab_size].contiguous(),)

    def to_mcore(self, tensors: Sequence[Tensor], architecture: ModelArchitecture, vocab_rows: int) -> Tensor:
        missing = vocab_rows - tensors[0].shape[0]
        if missing < 0:
            raise CheckpointError(f"'{self.hf[0]}' has {tensors[0].shape[0]} rows, more than the model's {vocab_rows}")
        if missing == 0:
            return tensors[0]
        padding = tensors[0].new_zeros(missing, *tensors[0].shape[1:])
        return torch.cat([tensors[0], padding], dim=0)


def mcore_to_hf(
    rules: Sequence[Rename], architecture: ModelArchitecture, state: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Every HF tensor of ``state`` (full, unsharded, mcore's names), one after another.

    Args:
        rules: the family's table for ``architecture``.
        architecture: of the model.
        state: full tensors by mcore name; ``_extra_state`` entries are left out.

    Raises:
        CheckpointError: a tensor is missing, unknown, or of another shape than the architecture's.
    """
    expanded = expand(rules, architecture.num_layers)
    names = {name for name in state if not name.endswith("_extra_state")}
    _require_same({rule.mcore for rule in expanded}, names, "the checkpoint")
    for rule in expanded:
        try:
            tensors = rule.to_hf(state[rule.mcore], architecture)
        except RuntimeError as error:
            raise _wrong_shape(rule.mcore, state[rule.mcore], error) from None
        yield from zip(rule.hf, tensors, strict=True)


def hf_to_mcore(
    rules: Sequence[Rename], architecture: ModelArchitecture, state: Mapping[str, Tensor], vocab_rows: int
) -> Iterator[tuple[str, Tensor]]:
    """Every mcore tensor of ``state`` (HF's names), full and unsharded, one after another.

    Args:
        rules: the family's table for ``architecture``.
        architecture: of the model.
        state: tensors by HF name. Rotary buffers are left out, and so is the output layer of a tied model.
        vocab_rows: rows of the padded vocabulary; the added ones are zero.

    Raises:
        CheckpointError: a tensor is missing, unknown, or of another shape than the architecture's.
    """
    expanded = expand(rules, architecture.num_layers)
    check_hf_names(expanded, architecture, set(state), "the Hugging Face folder")
    for rule in expanded:
        tensors = [state[name] for name in rule.hf]
        try:
            yield rule.mcore, rule.to_mcore(tensors, architecture, vocab_rows)
        except RuntimeError as error:
            raise _wrong_shape(rule.hf[0], tensors[0], error) from None


def check_hf_names(expanded: Sequence[Rename], architecture: ModelArchitecture, names: set[str], where: str) -> None:
    """Raise :class:`CheckpointError`, listing the names, unless HF tensors are just those of the expanded table."""
    ignored = {"lm_head.weight"} if architecture.tie_word_embeddings else set()
    found = {name for name in names if name not in ignored and not name.endswith("rotary_emb.inv_freq")}
    _require_same({name for rule in expanded for name in rule.hf}, found, where)


def expand(rules: Sequence[Rename], num_layers: int) -> list[Rename]:
    """The table with ``{layer}`` filled in, layer by layer, the rules without it in their places."""
    expanded: list[Rename] = []
    per_layer = [rule for rule in rules if "{layer}" in rule.mcore]
    for rule in rules:
        if rule not in per_layer:
            expanded.append(rule)
        elif rule is per_layer[0]:
            expanded.extend(_at_layer(one, layer) for layer in range(num_layers) for one in per_layer)
    return expanded


def _at_layer(rule: Rename, layer: int) -> Rename:
    return type(rule)(rule.mcore.format(layer=layer), tuple(name.format(layer=layer) for name in rule.hf))


def _require_same(expected: set[str], found: set[str], where: str) -> None:
    faults = []
    for word, names in (("lacks", expected - found), ("has unknown", found - expected)):
        if names:
            shown = ", ".join(f"'{name}'" for name in sorted(names)[:3])
            faults.append(f"{word} {shown}" + (f" and {len(names) - 3} more" if len(names) > 3 else ""))
    if faults:
        raise CheckpointError(f"{where} does not fit the architecture: it " + "; it ".join(faults))


def _wrong_shape(name: str, tensor: Tensor, error: RuntimeError) -> CheckpointError:
    reason = str(error).splitlines()[0]
    return CheckpointError(f"'{name}' of shape {list(tensor.shape)} does not fit the architecture: {reason}")


_MCORE, _HF = "decoder.layers.{layer}", "model.layers.{layer}"


def decoder_rules(architecture: ModelArchitecture, fused_norms: bool = False) -> tuple[Rename, ...]:
    """The table, in the model's order.

    Args:
        architecture: decides whether there is an output layer of its own, a bias on Q, K and V, and norms on Q and K.
        fused_norms: the names of the Transformer Engine spec, whose norms belong to the linear layers after them.
    """
    attention = f"{_MCORE}.self_attention"
    qkv = [f"{_HF}.self_attn.{part}_proj" for part in ("q", "k", "v")]
    input_norm = f"{attention}.linear_qkv.layer_norm_weight" if fused_norms else f"{_MCORE}.input_layernorm.weight"
    mlp_norm = f"{_MCORE}.mlp.linear_fc1.layer_norm_weight" if fused_norms else f"{_MCORE}.pre_mlp_layernorm.weight"
    rules = [
        Vocabulary("embedding.word_embeddings.weight", ("model.embed_tokens.weight",)),
        Rename(input_norm, (f"{_HF}.input_layernorm.weight",)),
        MergeQKV(f"{attention}.linear_qkv.weight", tuple(f"{name}.weight" for name in qkv)),
    ]
    if architecture.add_qkv_bias:
        rules.append(MergeQKV(f"{attention}.linear_qkv.bias", tuple(f"{name}.bias" for name in qkv)))
    if architecture.qk_layernorm:
        rules += [
            Rename(f"{attention}.{part}_layernorm.weight", (f"{_HF}.self_attn.{part}_norm.weight",))
            for part in ("q", "k")
        ]
    rules += [
        Rename(f"{attention}.linear_proj.weight", (f"{_HF}.self_attn.o_proj.weight",)),
        Rename(mlp_norm, (f"{_HF}.post_attention_layernorm.weight",)),
        MergeGateUp(f"{_MCORE}.mlp.linear_fc1.weight", (f"{_HF}.mlp.gate_proj.weight", f"{_HF}.mlp.up_proj.weight")),
        Rename(f"{_MCORE}.mlp.linear_fc2.weight", (f"{_HF}.mlp.down_proj.weight",)),
        Rename("decoder.final_layernorm.weight", ("model.norm.weight",)),
    ]
    if not architecture.tie_word_embeddings:
        rules.append(Vocabulary("output_layer.weight", ("lm_head.weight",)))
    return tuple(rules)


def uses_fused_norms(state: Mapping[str, Any]) -> bool:
    """Whether mcore tensors carry the names of the Transformer Engine spec."""
    return any(name.endswith("linear_qkv.layer_norm_weight") for name in state)
