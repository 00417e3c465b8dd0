"""``generate_corpus``: generated text as a chunk dataset, for sequence-level distillation (SeqKD).

    torchrun --nproc-per-node 2 tools/generate_corpus.py data.path=CORPUS model.path=TEACHER output=GENERATED

Each chunk's first ids, or its own prompt, are the prompt and the model samples the rest; with ``prompt: begin`` every
text begins with one id alone, the model's BOS. Every text has a seed of its own, so the result depends on neither batch
size nor layout. Finished parts are kept in ``<output>.partial``; a killed job resumes there and gives the same bytes.
"""

import dataclasses
import functools
import io
import logging
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from megatron_kd.artefacts.artefact_folder import building
from megatron_kd.artefacts.manifest import already_made, recipe_of
from megatron_kd.artefacts.work_store import WorkStore
from megatron_kd.checkpoints.weights import LoadedModel, load_for_inference
from megatron_kd.config import to_mapping
from megatron_kd.costs.flops import forward_flops
from megatron_kd.data.chunk_dataset import KIND, PROMPT_LENGTHS_NAME, ChunkDataset
from megatron_kd.data.chunk_dataset_writer import ChunkDatasetWriter
from megatron_kd.errors import ConfigError, DataError
from megatron_kd.generation.generation_config import GenerateCorpusConfig
from megatron_kd.generation.prompted_texts import Part, PromptSource, generate_part
from megatron_kd.logs import progress_bar
from megatron_kd.models.parameters import weights_fingerprint
from megatron_kd.parallel.coordination import on_main_rank
from megatron_kd.parallel.runtime import Runtime, distributed_runtime

logger = logging.getLogger(__name__)

TEXTS_PER_PART = 512


class GeneratedParts:
    """The parts of one generated corpus, numbered, in its work store.

    Args:
        store: of the corpus.
    """

    def __init__(self, store: WorkStore) -> None:
        self.store = store

    def is_done(self, number: int) -> bool:
        """Whether a part is there and whole; a damaged one is to be made again, and a line says so."""
        return self.store.is_whole(_part_name(number))

    def save(self, number: int, part: Part) -> None:
        """Write a part whole or not at all."""
        buffer = io.BytesIO()
        np.savez(buffer, ids=part.ids, lengths=part.lengths, prompt_lengths=part.prompt_lengths)
        self.store.write(_part_name(number), buffer.getvalue())

    def load(self, number: int) -> Part:
        """Read a part.

        Raises:
            DataError: it is missing or damaged.
        """
        with np.load(io.BytesIO(self.store.read(_part_name(number)).tobytes())) as file:
            return Part(file["ids"], file["lengths"], file["prompt_lengths"])


def run(config: GenerateCorpusConfig) -> Path:
    """Generate, write the dataset and return its folder."""
    with distributed_runtime() as runtime:
        dataset = ChunkDataset.open(config.data.path)
        loaded = load_for_inference(config.model, config.parallel, dataset, runtime)
        fingerprint = weights_fingerprint(loaded.model_chunks, loaded.groups.intra_dist_opt)
        prompts = _prompt_source(config, dataset, loaded.info.manifest.get("bos_id"))
        _check_positions(loaded, prompts)
        ingredients = _ingredients(config, dataset, fingerprint, prompts)
        recipe = recipe_of(ingredients)
        with WorkStore(config.output, {**ingredients, "texts_per_part": TEXTS_PER_PART}) as store:
            if on_main_rank(lambda: already_made(config.output, KIND, recipe)):
                on_main_rank(store.remove_leftovers)
                return Path(config.output)
            parts = GeneratedParts(store)
            on_main_rank(store.claim)
            _generate_missing(config, loaded, prompts, parts, runtime)
            on_main_rank(lambda: _write(config, dataset, loaded, fingerprint, recipe, prompts, parts))
            on_main_rank(store.remove)
    return Path(config.output)


def _prompt_source(config: GenerateCorpusConfig, dataset: ChunkDataset, bos_id: int | None) -> PromptSource:
    if config.num_texts is not None and config.prompt == "chunk" and config.num_texts > dataset.num_chunks:
        raise ConfigError(f"num_texts {config.num_texts} is above the {dataset.num_chunks} chunks of {dataset.path}")
    return PromptSource(
        dataset,
        num_texts=config.num_texts or dataset.num_chunks,
        prompt_length=config.prompt_length,
        response_length=config.response_length,
        first_id=None if config.prompt == "chunk" else dataset.eos_id if bos_id is None else bos_id,
    )


def _check_positions(loaded: LoadedModel, prompts: PromptSource) -> None:
    """Raise :class:`DataError` if a text can be longer than the model's positions."""
    positions = loaded.info.architecture.max_position_embeddings
    if prompts.max_length > positions:
        raise DataError(
            f"prompt and response together reach {prompts.max_length} ids, {loaded.info.path} has {positions} "
            "positions: lower prompt_length or response_length"
        )


def _ingredients(
    config: GenerateCorpusConfig, dataset: ChunkDataset, fingerprint: str, prompts: PromptSource
) -> dict[str, Any]:
    """Return everything that the text depends on: neither layout nor batch size."""
    names = ("prompt", "prompt_length", "response_length", "stop_at_eos", "seed")
    return {
        "tool": "generate_corpus",
        "dataset": dataset.fingerprint,
        "model": fingerprint,
        "num_texts": prompts.num_texts,
        "sampling": dataclasses.asdict(config.sampling),
        **{name: getattr(config, name) for name in names},
        **({} if prompts.first_id is None else {"first_id": prompts.first_id}),
        **({} if dataset.prompt_lengths is None else {"own_prompts": True}),
    }


def _generate_missing(
    config: GenerateCorpusConfig, loaded: LoadedModel, prompts: PromptSource, parts: GeneratedParts, runtime: Runtime
) -> None:
    starts = range(0, prompts.num_texts, TEXTS_PER_PART)
    done = on_main_rank(lambda: [parts.is_done(number) for number in range(len(starts))])
    with progress_bar(
        prompts.num_texts,
        "generate",
        "text",
        initial=min(prompts.num_texts, sum(done) * TEXTS_PER_PART),
        shown=runtime.is_main,
    ) as bar:
        for number, start in enumerate(starts):
            if done[number]:
                continue
            numbers = np.arange(start, min(start + TEXTS_PER_PART, prompts.num_texts))
            part = generate_part(
                loaded.model_chunks,
                loaded.groups,
                prompts,
                numbers,
                seed=config.seed,
                sampling=config.sampling,
                stop_at_eos=config.stop_at_eos,
                micro_batch_size=config.micro_batch_size,
                device=runtime.device,
                on_texts=bar.update,
            )
            on_main_rank(functools.partial(parts.save, number, part))


def _write(
    config: GenerateCorpusConfig,
    dataset: ChunkDataset,
    loaded: LoadedModel,
    fingerprint: str,
    recipe: str,
    prompts: PromptSource,
    parts: GeneratedParts,
) -> None:
    seq_length = max(dataset.seq_length, prompts.max_length - 1)
    count = -(-prompts.num_texts // TEXTS_PER_PART)
    prompt_lengths = []
    with (
        building(config.output) as folder,
        closing(ChunkDatasetWriter(folder, dataset.tokenizer_info(), seq_length)) as writer,
    ):
        for number in range(count):
            part: Part = parts.load(number)
            writer.add(part.ids, part.lengths)
            prompt_lengths.append(part.prompt_lengths)
        writer.add_array(PROMPT_LENGTHS_NAME, np.concatenate(prompt_lengths).astype(np.int32))
        writer.finish(
            {
                "tool": "generate_corpus",
                "recipe": recipe,
                "config": to_mapping(config),
                "flops": forward_flops(loaded.info.architecture.parameters, writer.num_tokens),
            },
            parents=_parents(dataset, loaded, fingerprint),
        )
    logger.info(f"{writer.num_chunks:,} texts of {writer.num_tokens:,} tokens into {config.output}")


def _parents(dataset: ChunkDataset, loaded: LoadedModel, fingerprint: str) -> list[dict[str, Any]]:
    return [
        {"kind": KIND, "path": str(dataset.path), "fingerprint": dataset.fingerprint},
        {"kind": "checkpoint", "path": str(loaded.info.path), "fingerprint": fingerprint},
    ]


def _part_name(number: int) -> str:
    return f"texts-{number:06d}"
