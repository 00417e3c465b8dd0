"""A folder in which the commands of a page of docs/ run unchanged, with its programs and the files that it names.

``python`` and ``torchrun`` are this interpreter's; training runs a few steps only, whatever a page asks for. ``sbatch``
records its arguments (test_slurm.py runs a real Slurm).
"""

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Mapping

from tests.end_to_end.commands import REPOSITORY, environment, run
from tests.end_to_end.pile_stand_in import write_corpus
from tests.reference.shards import sequences, write_megatron, write_miniplm

SEQ_LENGTH, BYTES = 128, 250_000
FEW_STEPS = {
    "tools/train.py": "training.train_iters=4 training.eval_interval=4 optimizer.lr_warmup_iters=2",
    "tools/predict_difference.py": "training.train_iters=4",
}
TOY = ["training.global_batch_size=4", "training.micro_batch_size=4", "training.train_iters=4"]


def commands(page: Path) -> list[str]:
    """Return the bash blocks of a page."""
    return re.findall(r"^```bash\n(.*?)^```$", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Material:
    """Artefacts of a small corpus: chunk datasets, run folders of teacher and reference model, an exported folder."""

    corpus: Path
    data: Path
    teacher: Path
    reference: Path
    hf: Path

    @classmethod
    def make(cls, folder: Path) -> "Material":
        """Tokenize, train a few steps, and export."""
        corpus, data = write_corpus(folder / "corpus", BYTES), folder / "data"
        made = cls(corpus, data, folder / "teacher", folder / "reference", folder / "hf")
        finished = [
            run(
                "tokenize_corpus",
                f"input={corpus}/*.jsonl.zst",
                f"tokenizer={corpus / 'tokenizer'}",
                f"output={data / 'train'}",
                f"heldout_output={data / 'heldout'}",
                f"reference_output={data / 'reference'}",
                "heldout_fraction=0.2",
                "reference_fraction=0.2",
                f"data.seq_length={SEQ_LENGTH}",
            )
        ]
        finished += [
            run("train", f"data.path={data / split}", f"output={output}", f"model.name={name}", *TOY)
            for split, output, name in (
                ("train", made.teacher, "qwen_toy_teacher"),
                ("reference", made.reference, "qwen_toy_reference"),
            )
        ]
        finished.append(run("convert_to_hf", f"input={made.teacher}", f"output={made.hf}"))
        for ended in finished:
            assert ended.status == 0, ended.stderr
        return made


class Workshop:
    """A folder that looks like a checkout with results.

    Args:
        few_steps: more overrides for the scripts that train; {} for none.
    """

    def __init__(self, folder: Path, few_steps: Mapping[str, str] = FEW_STEPS):
        self.folder, self.notes = folder, folder / "jobs"
        for name in ("tools", "examples"):
            self.link(name, REPOSITORY / name)
        programs = folder / "bin"
        programs.mkdir()
        few = "".join(f"    {script}) more=({keys}) ;;\n" for script, keys in few_steps.items())
        start = f'#!/bin/bash\nmore=()\nfor word; do case $word in\n{few}esac; done\nexec "{sys.executable}"'
        for name, text in {
            "python": f'{start} "$@" "${{more[@]}}"\n',
            "torchrun": f'{start} -m torch.distributed.run --standalone "$@" "${{more[@]}}"\n',
            "sbatch": f'#!/bin/bash\necho "$*" >> {self.notes}\nwc -l < {self.notes} | tr -d " "\n',
        }.items():
            (programs / name).write_text(text)
            (programs / name).chmod(0o755)
        self.environment = {**environment(), "PATH": f"{programs}:{os.environ['PATH']}", "PYTHONPATH": str(REPOSITORY)}

    def link(self, name: str, target: Path) -> None:
        """Make ``name`` in the workshop a link to ``target``."""
        place = self.folder / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(target)

    def run(self, page: Path, seconds: float, **variables: str) -> None:
        """Run every command of ``page``, in order, in one shell that ends at the first failure."""
        script = "set -euo pipefail\nset -x\n" + "\n".join(commands(page))
        ended = subprocess.run(
            ["bash", "-c", script],
            env=self.environment | variables,
            cwd=self.folder,
            text=True,
            capture_output=True,
            timeout=seconds,
        )
        assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]

    def stock(self, material: Material) -> None:
        """Link the names that the pages of docs/ use."""
        for name, target in {
            "pile": material.corpus,
            "Qwen1.5-1.8B": material.hf,
            "Qwen2.5-1.5B": material.hf,
            "runs/student": material.teacher,
            "TEACHER": material.teacher,
            "REFERENCE": material.reference,
            "D": material.data / "train",
            "CORPUS": material.data / "train",
            "runs/quickstart/data/train": material.data / "train",
            "runs/quickstart/data/heldout": material.data / "heldout",
            "runs/quickstart/runs/teacher": material.teacher,
        }.items():
            self.link(name, target)
        (self.folder / "STUDENT.yaml").write_text(
            "model: {name: qwen_toy_student}\noutput: runs/cached\n"
            "training: {global_batch_size: 4, micro_batch_size: 2}\n"
        )
        (self.folder / "pile-tokenized").mkdir()
        (self.folder / "megatron").mkdir()
        for number in range(2):
            write_miniplm(self.folder / f"pile-tokenized/data_{number}", sequences(number, 20, 1025, 512))
        write_megatron(self.folder / "megatron/my_text_document", sequences(3, 40, 300, 512))
