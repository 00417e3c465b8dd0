"""``sample_by_difference``: keep the chunks that the teacher predicts well and the reference model does not (MiniPLM,
arXiv 2410.17215).

    python tools/sample_by_difference.py data.path=… teacher_scores=… reference_scores=… ratio=0.5 output=…

    r(chunk) = reference NLL − teacher NLL, both means per token  →  the floor(ratio · n) largest, in corpus order

Ties go to the lower chunk index. A chunk that the score files list as unscored is never kept. The result keeps, for
every chunk, its id in the root dataset. ``docs/difference_sampling.md`` explains the keys and the report.
"""

import json
import logging
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_kd.artefacts.artefact_folder import building
from megatron_kd.artefacts.manifest import already_made, recipe_of
from megatron_kd.config import to_mapping
from megatron_kd.data.chunk_dataset import KIND, ChunkDataset
from megatron_kd.data.chunk_dataset_writer import ChunkDatasetWriter
from megatron_kd.data.copy_chunks import copy_chunks
from megatron_kd.errors import DataError
from megatron_kd.selection.differences import Differences, measured_differences, predicted_differences
from megatron_kd.selection.selection_report import report_files, selection_facts
from megatron_kd.selection.top_values import Candidates, select_at_least, select_within_budget

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SampledDataConfig:
    """The ``data.*`` keys of sampling."""

    path: str
    """The chunk dataset to sample from."""


@dataclass(frozen=True)
class SampleByDifferenceConfig:
    """Keys of ``sample_by_difference``."""

    data: SampledDataConfig
    output: str
    teacher_scores: str | None = None
    reference_scores: str | None = None
    predicted_difference: str | None = None
    """Instead of the two: what ``predict_difference`` wrote."""
    ratio: float | None = None
    """Share of the chunks to keep; 0.5 if neither of the next two is given."""
    token_budget: int | None = None
    """Keep at most this many ids."""
    threshold: float | None = None
    """Keep every chunk with at least this r, nats per token."""
    stratify_by_domain: bool = False
    """Apply the ratio, or the share of the budget, to each domain separately."""
    examples: int = 3
    """Decoded chunks from each of the top, the middle and the bottom of r in the report."""
    force: bool = False
    """Accept a reference model that was trained on chunks of this dataset."""

    def validate(self) -> Iterator[str]:
        """Yield one message for each fault in the values."""
        if self.ratio is not None and not 0 < self.ratio <= 1:
            yield f"ratio must be above 0 and at most 1, not {self.ratio}"
        if self.token_budget is not None and self.token_budget < 1:
            yield f"token_budget must be at least 1, not {self.token_budget}"
        given = [key for key in ("ratio", "token_budget", "threshold") if getattr(self, key) is not None]
        if len(given) > 1:
            yield f"{' and '.join(given)} exclude each other: give one"
        if self.stratify_by_domain and self.threshold is not None:
            yield "stratify_by_domain needs ratio or token_budget: a threshold is the same for every domain"
        if self.examples < 0:
            yield f"examples must not be negative, not {self.examples}"
        pair = (self.teacher_scores, self.reference_scores)
        if (self.predicted_difference is None) != (None not in pair) or (any(pair) and None in pair):
            yield "give teacher_scores and reference_scores, or predicted_difference"


def run(config: SampleByDifferenceConfig) -> str:
    """Make the sampled dataset and return its path.

    Raises:
        DataError: the dataset or a score file is missing or damaged; they do not match; nothing would be kept; the
            output exists and is something else.
    """
    dataset = ChunkDataset.open(config.data.path)
    differences = _open_differences(config, dataset)
    recipe = _recipe(config, dataset, differences)
    if already_made(config.output, KIND, recipe):
        ChunkDataset.open(config.output)
        logger.info(f"{config.output}: already made from these scores with these settings")
        return config.output
    kept = np.flatnonzero(_select(config, dataset, differences))
    if not len(kept):
        raise DataError(
            f"{config.data.path}: {_rule(config)} keeps none of {dataset.num_chunks} chunks; choose one that keeps more"
        )
    facts = {**_rule_facts(config), **selection_facts(dataset, differences, kept)}
    with (
        building(config.output) as folder,
        closing(
            ChunkDatasetWriter(folder, dataset.tokenizer_info(), dataset.seq_length, _chunks_per_shard(dataset))
        ) as writer,
    ):
        copy_chunks(dataset, kept, writer)
        writer.add_extra_file("selection.json", (json.dumps(facts, indent=2) + "\n").encode())
        for name, contents in report_files(dataset, differences, kept, facts, config.examples):
            writer.add_extra_file(name, contents)
        fingerprint = writer.finish(
            {"tool": "sample_by_difference", "config": to_mapping(config), "selection": facts, "recipe": recipe},
            [{"kind": KIND, "path": str(dataset.path), "fingerprint": dataset.fingerprint}, *differences.parents],
            dataset.root_fingerprint,
            dataset.root_ids(kept),
        )
    logger.info(
        f"kept {len(kept)} of {dataset.num_chunks} chunks, {writer.num_tokens / dataset.num_tokens:.1%} of the ids, "
        f"r ≥ {facts['threshold']:.4f} nats per token, {facts['share_negative']:.1%} of all have r < 0; "
        f"{config.output}, fingerprint {fingerprint[:12]}"
    )
    return config.output


def _open_differences(config: SampleByDifferenceConfig, dataset: ChunkDataset) -> Differences:
    if config.predicted_difference is not None:
        return predicted_differences(config.predicted_difference, dataset)
    return measured_differences(str(config.teacher_scores), str(config.reference_scores), dataset, config.force)


def _select(config: SampleByDifferenceConfig, dataset: ChunkDataset, differences: Differences) -> np.ndarray:
    """Return which chunks are kept, bool ``[num_chunks]``."""
    domains = dataset.domains if config.stratify_by_domain else None
    if config.stratify_by_domain and domains is None:
        raise DataError(
            f"{dataset.path}: its chunks name no domain; tokenise it with domain_field, or set stratify_by_domain=false"
        )
    candidates = Candidates(
        dataset.num_chunks,
        differences.block,
        costs=dataset.lengths_between if config.token_budget is not None else None,
        groups=None if domains is None else lambda start, stop: domains[start:stop],
        num_groups=1 if domains is None else len(dataset.domain_names),
    )
    if config.threshold is not None:
        return select_at_least(candidates, config.threshold)
    return select_within_budget(candidates, _budgets(config, candidates, dataset.num_tokens))


def _budgets(config: SampleByDifferenceConfig, candidates: Candidates, num_tokens: int) -> list[int]:
    """Return how many chunks, or ids, each group may keep: the floor of its share."""
    sizes = np.zeros(candidates.num_groups, dtype=np.float64)
    for start, stop in candidates.blocks():
        groups = np.zeros(stop - start, np.int64) if candidates.groups is None else candidates.groups(start, stop)
        weights = None if candidates.costs is None else candidates.costs(start, stop)
        sizes += np.bincount(groups, weights, minlength=candidates.num_groups)
    if config.token_budget is None:
        return [int((config.ratio or 0.5) * int(size)) for size in sizes]
    return [config.token_budget * int(size) // num_tokens for size in sizes]


def _rule(config: SampleByDifferenceConfig) -> str:
    return ", ".join(f"{key} {value}" for key, value in _rule_facts(config).items() if value)


def _rule_facts(config: SampleByDifferenceConfig) -> dict[str, Any]:
    rules = {key: getattr(config, key) for key in ("ratio", "token_budget", "threshold")}
    chosen = {key: value for key, value in rules.items() if value is not None} or {"ratio": 0.5}
    return {**chosen, "stratify_by_domain": config.stratify_by_domain}


def _recipe(config: SampleByDifferenceConfig, dataset: ChunkDataset, differences: Differences) -> str:
    parents = [dataset.fingerprint, *(parent["fingerprint"] for parent in differences.parents)]
    return recipe_of({
        "tool": "sample_by_difference", "parents": parents, **_rule_facts(config), "examples": config.examples,
    })  # fmt: skip


def _chunks_per_shard(dataset: ChunkDataset) -> int:
    return max((len(shard) for shard in dataset.shards), default=1)
