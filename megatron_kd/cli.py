"""Command line: ``python tools/<verb>.py`` and ``megatron-kd <verb>`` are the same program.

    python tools/train.py --config FILE [key=value …] [--dry-run]

Exit status: 0 on success; 2, with one line on stderr, for a bad configuration or bad input; 75 for a run that was told
to stop and resumes when the same command is started again; 1 for anything else.
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
    """One verb of the command line; its function is ``run(config)`` of the module that is named after it.

    Attributes:
        config: its configuration class as ``package.module.Class`` below ``megatron_kd``. The verb's own module stands
            in the same package.
        summary: what it does, in one line.
        positional: the key that arguments without ``=`` are values of; None refuses them.
    """

    config: str
    summary: str
    positional: str | None = None

    def load_config_class(self) -> type[Any]:
        """Import the configuration class, and nothing that only ``run`` needs where the two are in separate modules."""
        module, _, name = self.config.rpartition(".")
        return getattr(importlib.import_module(f"megatron_kd.{module}"), name)

    def load_function(self, verb: str) -> Callable[[Any], Any]:
        """Import the function that does the work of the verb called ``verb``."""
        package = self.config.rsplit(".", 2)[0]
        return importlib.import_module(f"megatron_kd.{package}.{verb}").run


VERBS: dict[str, Verb] = {
    "tokenize_corpus": Verb("data.tokenize_corpus.TokenizeCorpusConfig", "documents to a chunk dataset"),
    "adopt_dataset": Verb("data.adopt_dataset.AdoptDatasetConfig", "existing .bin/.idx files as a chunk dataset"),
    "train": Verb("training.train_config.TrainConfig", "pre-train or distil a model"),
    "score_corpus": Verb("scoring.score_config.ScoreCorpusConfig", "mean NLL of every chunk under a model"),
    "sample_by_difference": Verb(
        "selection.sample_by_difference.SampleByDifferenceConfig", "the chunks that the teacher finds easier"
    ),
    "generate_corpus": Verb("generation.generation_config.GenerateCorpusConfig", "generated text as a chunk dataset"),
    "cache_teacher_logits": Verb(
        "teachers.teacher_config.CacheTeacherLogitsConfig", "the teacher's targets for every chunk, on disk"
    ),
    "convert_from_hf": Verb("conversion.conversion_config.ConvertFromHFConfig", "Hugging Face folder to checkpoint"),
    "convert_to_hf": Verb("conversion.conversion_config.ConvertToHFConfig", "checkpoint to Hugging Face folder"),
    "evaluate": Verb("evaluation.evaluate_config.EvaluateConfig", "held-out loss, bits per byte, zero-shot tasks"),
    "plan_run": Verb("planning.plan_run.PlanRunConfig", "memory, time and storage of a run, before it starts"),
    "fit_scaling_law": Verb(
        "evaluation.fit_scaling_law.FitScalingLawConfig", "loss over FLOPs, extrapolated", positional="runs"
    ),
    "plot": Verb("metrics.plot.PlotConfig", "charts of one or several runs", positional="runs"),
    "split_dataset": Verb("selection.split_dataset.SplitDatasetConfig", "a random part of a chunk dataset"),
    "predict_difference": Verb(
        "selection.prediction_config.PredictDifferenceConfig", "differences predicted by a proxy trained on a part"
    ),
    "convert_tokenization": Verb(
        "data.convert_tokenization.ConvertTokenizationConfig", "a chunk dataset in another tokenizer's ids"
    ),
    "measure_diversity": Verb(
        "evaluation.measure_diversity.MeasureDiversityConfig", "n-gram diversity and Vendi score of corpora"
    ),
    "inspect_dataset": Verb("evaluation.inspect_dataset.InspectDatasetConfig", "what an artefact on disk is"),
}


def main(verb: str | None = None, argv: Sequence[str] | None = None) -> NoReturn:
    """Run one verb and exit; without ``verb``, the first argument names it."""
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
    """Reports a bad command line on one line, like every other bad input."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"the command line: {message} (--help shows the usage)")


def _run_verb(name: str, arguments: Sequence[str]) -> int:
    verb = VERBS[name]
    parser = _Parser(prog=name, description=verb.summary)
    parser.add_argument("--config", metavar="FILE", help="YAML file with the verb's keys")
    parser.add_argument("--dry-run", action="store_true", help="check and print the resolved configuration, then exit")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of the file, with dotted keys")
    start_logging(name)
    silence_known_noise()

    def load_and_run() -> None:
        schema = verb.load_config_class()
        options = parser.parse_intermixed_args(_spell_out_flags(arguments, schema))
        config = load_config(schema, options.config, _with_positional(verb, options.overrides))
        if options.dry_run:
            sys.stdout.write(dump_yaml(config))
        else:
            verb.load_function(name)(config)

    return status_of(name, load_and_run)


def status_of(name: str, action: Callable[[], Any]) -> int:
    """Run ``action`` and return the exit status; an error that the user can fix is one line, prefixed with ``name``."""
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


def _spell_out_flags(arguments: Sequence[str], schema: type[Any]) -> list[str]:
    """Replace ``--verify`` by ``verify=true``, and so on for every boolean key of the verb."""
    names = [field.name for field in fields(schema) if field.type in (bool, "bool")]
    flags = {f"--{name.replace('_', '-')}": name for name in names}
    return [f"{flags[argument]}=true" if argument in flags else argument for argument in arguments]


def _refuse(name: str, message: str, is_reported: bool | None = None, status: int = EXIT_BAD_INPUT) -> int:
    """Print one line, on one rank only: rank 0 where the ranks have not agreed on another; return ``status``."""
    prints = is_reporting_rank() if is_reported is None else not is_reported
    if prints:
        sys.stderr.write(f"{name}: {' '.join(message.split())}\n")
        sys.stderr.flush()
    return status
