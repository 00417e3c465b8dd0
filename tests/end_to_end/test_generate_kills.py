"""``generate_corpus`` killed and started again, on one rank or two, gives the bytes of a run that nobody disturbed."""

from pathlib import Path

import pytest

from tests.end_to_end.commands import run
from tests.end_to_end.random_kills import KilledCommand

DRIVER = Path(__file__).parent / "dying_generator.py"
WRITES = 8  # of a run from its start: a part for every 4 of 24 texts, the manifest, the removal of the parts


@pytest.mark.slow
def test_four_kills(dataset, teacher, tmp_path):
    def arguments(output):
        return [f"data.path={dataset.path}", f"model.path={teacher}", "prompt_length=12", "response_length=16",
                "num_texts=24", "micro_batch_size=3", f"output={output}"]  # fmt: skip

    def finish(given, chance):
        ranks = 1 if chance is None else chance.choice([1, 2])
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("DIE_AT", "0")
            ended = run("generate_corpus", *given, program=DRIVER, ranks=ranks)
        assert ended.status == 0, ended.stderr

    def files(output):
        assert not output.with_name(f"{output.name}.partial").exists()
        return {path.name: path.read_bytes() for path in output.iterdir() if path.name != "manifest.json"}

    def check(output):
        assert files(output) == expected

    finish(arguments(tmp_path / "whole"), None)
    expected = files(tmp_path / "whole")
    assert len(expected) >= 4
    KilledCommand("generate_corpus", DRIVER, WRITES, arguments, finish, check).survive(tmp_path, 4, 3)
