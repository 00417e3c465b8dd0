"""The quickstart's steps, from raw text to exported students, and how they depend on each other.

    text → tokenizer → tokenize ─┬→ teacher ──┬→ score_teacher ──┐
                                 │            └→ vanilla_kd      ├→ sample ─┬→ miniplm
                                 ├→ reference ─→ score_reference ┘          └→ miniplm_vanilla_kd (and the teacher)
                                 └→ pretrain, pretrain_seed2                       every student → export, plot

Every step except the first two runs a verb of ``tools/`` with a file of ``examples/quickstart``; the paths in those
files are relative to the folder where the quickstart runs.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import yaml

from megatron_kd.quickstart.step_runner import Step

ROOT = Path("runs/quickstart")
TEXT, TOKENIZER = ROOT / "data/corpus.jsonl", ROOT / "data/tokenizer"
TRAIN_DATA, HELDOUT_DATA, REFERENCE_DATA = (ROOT / f"data/{split}" for split in ("train", "heldout", "reference"))
SAMPLED_DATA, GENERATED_DATA = ROOT / "data/sampled", ROOT / "data/seqkd"
CHARTS = ROOT / "training.png"
VOCAB_SIZE = 512
SECOND_SEED = 11


@dataclass(frozen=True)
class Student:
    """A student of the quickstart.

    Attributes:
        step: name of its training step.
        method: the method's name in the report.
        config: its configuration file, relative to ``examples/quickstart``.
        needs: steps that training waits for.
        seconds: estimated duration.
        overrides: overrides of the file.
        continues: whether the method is meant to continue a trained student.
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
SECOND_SEED_RUN = Student(
    "pretrain_seed2",
    "Pre-Train w/o KD",
    "student_pretrain.yaml",
    ("tokenize",),
    65,
    (f"training.seed={SECOND_SEED}",),
)
# Methods that generate text, behind --all-methods: they take longer than the quickstart may. They start from random
# weights like the others, where their own examples start from a trained student.
_FROM_SCRATCH = ("model.init_from=null", "optimizer.lr=8e-3")
STUDENTS_WITH_TEXT = (
    Student("seqkd", "SeqKD", "../seqkd_quickstart/student.yaml", ("generate_seqkd",), 65),
    Student("gkd", "GKD", "../gkd_quickstart/student.yaml", ("teacher",), 80, (), True),
    Student("minillm", "MiniLLM", "../minillm_quickstart/student.yaml", ("teacher",), 100, _FROM_SCRATCH, True),
    Student("distillm", "DistiLLM", "../distillm_quickstart/student.yaml", ("teacher",), 70, _FROM_SCRATCH, True),
)


def run_folder(step: str) -> Path:
    """Return the run folder of a training step."""
    return ROOT / "runs" / step


def hf_folder(step: str) -> Path:
    """Return the Hugging Face folder of a student."""
    return ROOT / "hf" / step


def chosen_students(all_methods: bool) -> tuple[Student, ...]:
    """Return the students of a run, with or without those whose methods generate text."""
    return STUDENTS + STUDENTS_WITH_TEXT if all_methods else STUDENTS


def quickstart_steps(repository: Path, all_methods: bool = False) -> list[Step]:
    """Return every step, each after those that it needs.

    Args:
        repository: the checkout, with ``tools/`` and ``examples/quickstart``.
        all_methods: include the methods that generate text.
    """
    students, checkout = chosen_students(all_methods), _Checkout(repository)
    generation = checkout.verb(
        "generate_seqkd",
        "generate_corpus",
        config="../seqkd_quickstart/generate_corpus.yaml",
        needs=("teacher",),
        outputs=(GENERATED_DATA,),
        seconds=50,
    )
    return [
        *_data_steps(checkout),
        checkout.training("teacher", "teacher.yaml", ("tokenize",), 130),
        checkout.training("reference", "reference.yaml", ("tokenize",), 25),
        checkout.student(SECOND_SEED_RUN),
        *_sampling_steps(checkout),
        *([generation] if all_methods else []),
        *(checkout.student(student) for student in students),
        *(
            checkout.verb(
                f"export_{student.step}",
                "convert_to_hf",
                f"input={run_folder(student.step)}",
                f"output={hf_folder(student.step)}",
                needs=(student.step,),
                outputs=(hf_folder(student.step),),
                seconds=12,
            )
            for student in students
        ),
        checkout.verb(
            "plot",
            "plot",
            *(str(run_folder(student.step)) for student in students),
            "x=flops",
            f"output={CHARTS}",
            needs=tuple(student.step for student in students),
            outputs=(CHARTS,),
            seconds=3,
        ),
    ]


def _data_steps(checkout: "_Checkout") -> list[Step]:
    corpus = (sys.executable, "-m", "megatron_kd.quickstart.corpus")
    return [
        Step("text", (*corpus, "text", str(TEXT)), outputs=(TEXT,), seconds=2),
        Step(
            "tokenizer",
            (*corpus, "tokenizer", str(TEXT), str(VOCAB_SIZE), str(TOKENIZER)),
            needs=("text",),
            outputs=(TOKENIZER,),
            seconds=4,
        ),
        checkout.verb(
            "tokenize",
            "tokenize_corpus",
            config="tokenize_corpus.yaml",
            needs=("tokenizer",),
            outputs=(TRAIN_DATA, HELDOUT_DATA, REFERENCE_DATA),
            seconds=3,
        ),
    ]


def _sampling_steps(checkout: "_Checkout") -> list[Step]:
    scoring = [
        checkout.verb(
            f"score_{model}",
            "score_corpus",
            config=f"score_{model}.yaml",
            needs=(model,),
            outputs=(ROOT / "scores" / model,),
            seconds=seconds,
        )
        for model, seconds in (("teacher", 55), ("reference", 20))
    ]
    sampling = checkout.verb(
        "sample",
        "sample_by_difference",
        config="sample_by_difference.yaml",
        needs=("score_teacher", "score_reference"),
        outputs=(SAMPLED_DATA,),
        seconds=2,
    )
    return [*scoring, sampling]


@dataclass(frozen=True)
class _Checkout:
    """Makes steps of the tools and configuration files of a checkout."""

    repository: Path

    def student(self, student: Student) -> Step:
        """Return the step that trains a student."""
        return self.training(student.step, student.config, student.needs, student.seconds, *student.overrides)

    def training(self, name: str, config: str, needs: tuple[str, ...], seconds: float, *overrides: str) -> Step:
        """Return a step that trains with a configuration file, into the run folder named after the step."""
        folder, file = run_folder(name), self._file(config)
        return Step(
            name,
            self._command("train", file, f"output={folder}", *overrides),
            needs=needs,
            outputs=(folder,),
            configs=config_chain(file),
            seconds=seconds,
            metrics=(folder, read_train_iters(file)),
            resumable=True,
        )

    def verb(
        self,
        name: str,
        verb: str,
        *overrides: str,
        needs: tuple[str, ...],
        outputs: tuple[Path, ...],
        seconds: float,
        config: str | None = None,
    ) -> Step:
        """Return a step that runs any other verb."""
        file = self._file(config) if config else None
        return Step(
            name,
            self._command(verb, file, *overrides),
            needs=needs,
            outputs=outputs,
            configs=config_chain(file) if file else (),
            seconds=seconds,
        )

    def _file(self, config: str) -> Path:
        return self.repository / "examples/quickstart" / config

    def _command(self, verb: str, config: Path | None, *overrides: str) -> tuple[str, ...]:
        given = ("--config", str(config)) if config else ()
        return (sys.executable, str(self.repository / f"tools/{verb}.py"), *given, *overrides)


def config_chain(path: Path) -> tuple[Path, ...]:
    """Return a configuration file and those that its ``base:`` leads to."""
    base = yaml.safe_load(path.read_text(encoding="utf-8")).get("base")
    return (path, *(config_chain(path.parent / base) if base else ()))


def read_train_iters(path: Path) -> int:
    """Read ``training.train_iters`` of a configuration file or of its base."""
    for file in config_chain(path):
        training = yaml.safe_load(file.read_text(encoding="utf-8")).get("training") or {}
        if "train_iters" in training:
            return training["train_iters"]
    raise ValueError(f"{path}: neither the file nor its base sets training.train_iters")
