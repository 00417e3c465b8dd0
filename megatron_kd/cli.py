"""The shell's way in: ``python tools/<verb>.py`` and ``megatron-kd <verb>`` are the same program.

    python tools/train.py --config FILE [key=value …] [--dry-run]

Exit status: 0 on success; 2, with one line on stderr, for a bad configuration or bad input; 75 for a run that was told
to stop and goes on when started again; 1 for anything else.
"""

import argparse
import importlib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, NoReturn

from megatron_kd.config import dump_yaml, load_config
from megatron_kd.errors import EXIT_BAD_INPUT, ConfigError, UserError, disk_full
from megatron_kd.logs import is_reporting_rank, silence_known_noise, start_logging


@dataclass(frozen=True)
class Verb:
    """Where a verb's configuration type and its ``run(config)`` function live, and what it does in one line."""

    module: str
    config: str
    summary: str
    run: str = "run"
    positional: str | None = None
    """The key of arguments without ``=``; without one they are refused."""


VERBS: dict[str, Verb] = {
    "tokenize_corpus": Verb("megatron_kd.data.tokenize_corpus", "TokenizeCorpusConfig", "documents to a chunk dataset"),
    "adopt_dataset": Verb(
        "megatron_kd.data.adopt_dataset", "AdoptDatasetConfig", "existing .bin/.idx files as a chunk dataset, no copy"
    ),
    "train": Verb("megatron_kd.training.train", "TrainConfig", "pre-train or distil a model"),
    "score_corpus": Verb(
        "megatron_kd.scoring.score_corpus", "ScoreCorpusConfig", "mean NLL of every chunk under a model"
    ),
    "sample_by_difference": Verb(
        "megatron_kd.selection.sample_by_difference",
        "SampleByDifferenceConfig",
        "keep the chunks that the teacher finds easier",
    ),
    "generate_corpus": Verb(
        "megatron_kd.generation.generate_corpus",
        "GenerateCorpusConfig",
        "a model's own text as a chunk dataset (SeqKD)",
    ),
    "cache_teacher_logits": Verb(
        "megatron_kd.teachers.cache.cache_teacher_logits",
        "CacheTeacherLogitsConfig",
        "what a teacher says about every chunk, on disk",
    ),
    "convert_from_hf": Verb(
        "megatron_kd.conversion.convert_from_hf", "ConvertFromHFConfig", "Hugging Face folder to checkpoint"
    ),
    "convert_to_hf": Verb(
        "megatron_kd.conversion.convert_to_hf", "ConvertToHFConfig", "checkpoint to Hugging Face folder"
    ),
    "evaluate": Verb("megatron_kd.evaluation.evaluate", "EvaluateConfig", "held-out loss and bits per byte"),
    "plan_run": Verb(
        "megatron_kd.planning.plan_run", "PlanRunConfig", "memory, time and storage of a run, before it starts"
    ),
    "fit_scaling_law": Verb(
        "megatron_kd.evaluation.fit_scaling_law",
        "FitScalingLawConfig",
        "loss over FLOPs, extrapolated",
        positional="runs",
    ),
    "plot": Verb("megatron_kd.metrics.plot", "PlotConfig", "charts of one or several runs", positional="runs"),
    "split_dataset": Verb(
        "megatron_kd.selection.split_dataset", "SplitDatasetConfig", "a random part of a chunk dataset"
    ),
    "predict_difference": Verb(
        "megatron_kd.selection.predict_difference", "PredictDifferenceConfig", "a proxy's r, learnt from scored chunks"
    ),
    "convert_tokenization": Verb(
        "megatron_kd.data.convert_tokenization", "ConvertTokenizationConfig", "a chunk dataset to another tokenizer"
    ),
    "measure_diversity": Verb(
        "megatron_kd.evaluation.measure_diversity",
        "MeasureDiversityConfig",
        "n-gram diversity and Vendi score of corpora",
    ),
    "inspect_dataset": Verb(
        "megatron_kd.evaluation.inspect_dataset", "InspectDatasetConfig", "what an artefact on disk is"
    ),
}


def main(verb: str | None = None, argv: Sequence[str] | None = None) -> NoReturn:
    """Run one verb and exit; without ``verb`` the first argument names it."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if verb is None:
        verb = _choose_verb(arguments)
    sys.exit(_run_verb(verb, arguments))


def _choose_verb(arguments: list[str]) -> str:
    if arguments and arguments[0] in VERBS:
        return arguments.pop(0)
    listing = "\n".join(f"  {name:<22}{verb.summary}" for name, verb in VERBS.items())
    if arguments and arguments[0] in ("-h", "--help"):
        sys.stdout.write(f"usage: megatron-kd VERB --config FILE [key=value ...] [--dry-run]\n\n{listing}\n")
        sys.exit(0)
    given = f"'{arguments[0]}' is not a verb" if arguments else "no verb given"
    sys.stderr.write(f"megatron-kd: {given}; choose one of {', '.join(VERBS)}\n")
    sys.exit(EXIT_BAD_INPUT)


class _Parser(argparse.ArgumentParser):
    """Says what is wrong with a command line on one line, like every other refusal."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"the command line: {message} (--help shows the usage)")


def _run_verb(name: str, arguments: Sequence[str]) -> int:
    verb = VERBS[name]
    parser = _Parser(prog=name, description=verb.summary)
    parser.add_argument("--config", metavar="FILE", help="YAML file with the verb's keys")
    parser.add_argument("--dry-run", action="store_true", help="check and print the resolved configuration, do nothing")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="laid over the file, dotted keys")
    start_logging(name)
    silence_known_noise()

    def load_and_run() -> None:
        module = importlib.import_module(verb.module)
        options = parser.parse_intermixed_args(_spell_out_flags(arguments, getattr(module, verb.config)))
        config = load_config(getattr(module, verb.config), options.config, _with_positional(verb, options.overrides))
        if options.dry_run:
            sys.stdout.write(dump_yaml(config))
            return
        run: Callable[[Any], Any] = getattr(module, verb.run)
        run(config)

    return status_of(name, load_and_run)


def status_of(name: str, action: Callable[[], Any]) -> int:
    """Do it; the exit status, with one line on stderr, headed by ``name``, for what the user can mend."""
    try:
        action()
    except UserError as error:
        return _refuse(name, str(error), error.is_reported, error.exit_status)
    except OSError as error:
        full = disk_full(error)
        if full is None:
            raise
        return _refuse(name, str(full))
    return 0


def _with_positional(verb: Verb, arguments: Sequence[str]) -> list[str]:
    plain = [argument for argument in arguments if "=" not in argument]
    if verb.positional is None or not plain:
        return list(arguments)
    return [argument for argument in arguments if "=" in argument] + [f"{verb.positional}={json.dumps(plain)}"]


def _spell_out_flags(arguments: Sequence[str], schema: type) -> list[str]:
    """``--verify`` for ``verify=true``, where the verb has such a key."""
    names = [field.name for field in fields(schema) if field.type in (bool, "bool")]
    flags = {f"--{name.replace('_', '-')}": name for name in names}
    return [f"{flags[argument]}=true" if argument in flags else argument for argument in arguments]


def _refuse(name: str, message: str, is_reported: bool | None = None, status: int = EXIT_BAD_INPUT) -> int:
    """One line on stderr, from one rank only under torchrun: rank 0 where the ranks have not agreed on one."""
    if not is_reported if is_reported is not None else is_reporting_rank():
        sys.stderr.write(f"{name}: {' '.join(message.split())}\n")
        sys.stderr.flush()
    return status
