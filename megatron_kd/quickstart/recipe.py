"""The quickstart's steps, from raw text to exported students, and how they depend on each other.

    text → tokenizer → tokenize ─┬→ teacher ──┬→ score_teacher ──┐
                                 │            └→ vanilla_kd      ├→ sample ─┬→ miniplm
                                 ├→ reference ─→ score_reference ┘          └→ miniplm_vanilla_kd (and the teacher)
                                 └→ pretrain, pretrain_seed2                       every student → export, plot

Every step but the first two is a verb of ``tools/`` with a file of ``examples/quickstart``; the paths in those files
are relative to the folder where the quickstart runs.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import yaml

from megatron_kd.quickstart.step_runner import Step

ROOT = Path("runs/quickstart")
TEXT, TOKENIZER = ROOT / "data/corpus.jsonl", ROOT / "data/tokenizer"
TRAIN_DATA, HELDOUT_DATA, REFERENCE_DATA = (ROOT / f"data/{split}" for split in ("train", "heldout", "reference"))
SAMPLED_DATA = ROOT / "data/sampled"
CHARTS = ROOT / "training.png"
VOCAB_SIZE = 512
SECOND_SEED = 11


@dataclass(frozen=True)
class Student:
    """A student: its step's and configuration file's name, the method's name, and what it needs beside data.

    ``overrides`` are laid over the file. ``continues``: the method is meant to continue a trained student.
    """

    step: str
    method: str
    config: str
    needs: tuple[str, ...]
    seconds: float
    overrides: tuple[str, ...] = ()
    continues: bool = False


STUDENTS = (
    Student("pretrain", "Pre-Train w/o KD", "student_pretrain.yaml", ("tokenize",), 65),
    Student("vanilla_kd", "Vanilla KD", "student_vanilla_kd.yaml", ("teacher",), 55),
    Student("miniplm", "MiniPLM", "student_miniplm.yaml", ("sample",), 65),
    Student("miniplm_vanilla_kd", "MiniPLM + Vanilla KD", "student_miniplm_vanilla_kd.yaml", ("sample", "teacher"), 55),
)
# Methods that generate text, behind --all-methods: they take longer than the quickstart has. From random weights like
# the others, where their own examples start from given ones.
_FROM_SCRATCH = ("model.init_from=null", "optimizer.lr=8e-3")
STUDENTS_WITH_TEXT = (
    Student("seqkd", "SeqKD", "../seqkd_quickstart/student.yaml", ("generate_seqkd",), 65),
    Student("gkd", "GKD", "../gkd_quickstart/student.yaml", ("teacher",), 80, (), True),
    Student("minillm", "MiniLLM", "../minillm_quickstart/student.yaml", ("teacher",), 100, _FROM_SCRATCH, True),
    Student("distillm", "DistiLLM", "../distillm_quickstart/student.yaml", ("teacher",), 70, _FROM_SCRATCH, True),
)
GENERATED_DATA = ROOT / "data/seqkd"
SECOND_SEED_RUN = Student("pretrain_seed2", "Pre-Train w/o KD", "student_pretrain.yaml", ("tokenize",), 65)


def run_folder(step: str) -> Path:
    """The run folder of a training step."""
    return ROOT / "runs" / step


def hf_folder(step: str) -> Path:
    """The Hugging Face folder of a student."""
    return ROOT / "hf" / step


def chosen_students(all_methods: bool) -> tuple[Student, ...]:
    """The students of a run, with or without those that generate text."""
    return STUDENTS + STUDENTS_WITH_TEXT if all_methods else STUDENTS


def quickstart_steps(repository: Path, all_methods: bool = False) -> list[Step]:
    """Every step, each after what it needs.

    Args:
        repository: the checkout, with ``tools/`` and ``examples/quickstart``.
        all_methods: also those that generate text.
    """
    students = chosen_students(all_methods)
    configs = repository / "examples/quickstart"
    return [
        *_data_steps(repository, configs),
        _training(repository, configs, "teacher", "teacher.yaml", ("tokenize",), 130),
        _training(repository, configs, "reference", "reference.yaml", ("tokenize",), 25),
        _training(repository, configs, "pretrain", "student_pretrain.yaml", ("tokenize",), 65),
        _training(
            repository,
            configs,
            SECOND_SEED_RUN.step,
            SECOND_SEED_RUN.config,
            SECOND_SEED_RUN.needs,
            SECOND_SEED_RUN.seconds,
            f"training.seed={SECOND_SEED}",
        ),
        _verb(
            repository,
            configs,
            "score_teacher",
            "score_corpus",
            "score_teacher.yaml",
            ("teacher",),
            (ROOT / "scores/teacher",),
            55,
        ),
        _verb(
            repository,
            configs,
            "score_reference",
            "score_corpus",
            "score_reference.yaml",
            ("reference",),
            (ROOT / "scores/reference",),
            20,
        ),
        _verb(
            repository,
            configs,
            "sample",
            "sample_by_difference",
            "sample_by_difference.yaml",
            ("score_teacher", "score_reference"),
            (SAMPLED_DATA,),
            2,
        ),
        *(
            [
                _verb(
                    repository,
                    configs,
                    "generate_seqkd",
                    "generate_corpus",
                    "../seqkd_quickstart/generate_corpus.yaml",
                    ("teacher",),
                    (GENERATED_DATA,),
                    50,
                )
            ]
            if all_methods
            else []
        ),
        *(
            _training(
                repository, configs, student.step, student.config, student.needs, student.seconds, *student.overrides
            )
            for student in students
            if student.step != "pretrain"
        ),
        *(
            _verb(
                repository,
                configs,
                f"export_{student.step}",
                "convert_to_hf",
                None,
                (student.step,),
                (hf_folder(student.step),),
                12,
                f"input={run_folder(student.step)}",
                f"output={hf_folder(student.step)}",
            )
            for student in students
        ),
        _verb(
            repository,
            configs,
            "plot",
            "plot",
            None,
            tuple(student.step for student in students),
            (CHARTS,),
            3,
            *(str(run_folder(student.step)) for student in students),
            "x=flops",
            f"output={CHARTS}",
        ),
    ]


def _data_steps(repository: Path, configs: Path) -> list[Step]:
    module = (sys.executable, "-m")
    return [
        Step("text", (*module, "megatron_kd.quickstart.text", str(TEXT)), outputs=(TEXT,), seconds=2),
        Step(
            "tokenizer",
            (*module, "megatron_kd.quickstart.tokenizer", str(TEXT), str(VOCAB_SIZE), str(TOKENIZER)),
            needs=("text",),
            outputs=(TOKENIZER,),
            seconds=4,
        ),
        _verb(
            repository,
            configs,
            "tokenize",
            "tokenize_corpus",
            "tokenize_corpus.yaml",
            ("tokenizer",),
            (TRAIN_DATA, HELDOUT_DATA, REFERENCE_DATA),
            3,
        ),
    ]


def _training(
    repository: Path, configs: Path, name: str, config: str, needs: tuple[str, ...], seconds: float, *overrides: str
) -> Step:
    folder = run_folder(name)
    command = _command(repository, "train", configs / config, f"output={folder}", *overrides)
    return Step(
        name,
        command,
        needs=needs,
        outputs=(folder,),
        configs=config_chain(configs / config),
        seconds=seconds,
        metrics=(folder, read_train_iters(configs / config)),
        resumable=True,
    )


def _verb(
    repository: Path,
    configs: Path,
    name: str,
    verb: str,
    config: str | None,
    needs: tuple[str, ...],
    outputs: tuple[Path, ...],
    seconds: float,
    *overrides: str,
) -> Step:
    file = configs / config if config else None
    return Step(
        name,
        _command(repository, verb, file, *overrides),
        needs=needs,
        outputs=outputs,
        configs=config_chain(file) if file else (),
        seconds=seconds,
    )


def _command(repository: Path, verb: str, config: Path | None, *overrides: str) -> tuple[str, ...]:
    given = ("--config", str(config)) if config else ()
    return (sys.executable, str(repository / f"tools/{verb}.py"), *given, *overrides)


def config_chain(path: Path) -> tuple[Path, ...]:
    """A configuration file and those that its ``base:`` leads to."""
    base = yaml.safe_load(path.read_text(encoding="utf-8")).get("base")
    return (path, *(config_chain(path.parent / base) if base else ()))


def read_train_iters(path: Path) -> int:
    """``training.train_iters`` of a configuration file or of its base."""
    for file in config_chain(path):
        training = yaml.safe_load(file.read_text(encoding="utf-8")).get("training") or {}
        if "train_iters" in training:
            return training["train_iters"]
    raise ValueError(f"{path}: neither it nor its base says training.train_iters")
