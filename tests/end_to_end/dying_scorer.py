"""``score_corpus`` that dies by SIGKILL inside the write of its n-th finished unit: DIE_AT=n DIE_AFTER_BYTES=b."""

import os
import signal

from megatron_kd.cli import main
from megatron_kd.scoring.journal import ScoreJournal

whole_add = ScoreJournal.add
calls = 0


def add_and_perhaps_die(journal: ScoreJournal, *arguments: object) -> None:
    global calls
    calls += 1
    whole_add(journal, *arguments)
    if calls == int(os.environ["DIE_AT"]):
        size = journal._file.tell()
        one = size // calls  # every unit has as many chunks, so records are equally long
        os.truncate(journal._file.name, size - one + int(os.environ["DIE_AFTER_BYTES"]) % one)
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    ScoreJournal.add = add_and_perhaps_die
    main("score_corpus")
