"""A command that is killed again and again, and must give the bytes of a run that nobody disturbed.

``KILL_SEED`` repeats a run; the seed is printed. A kill counts as inside a write only if the driver died there: it ends
by SIGKILL inside its ``DIE_AT``-th write, of which the first ``DIE_AFTER_BYTES`` (modulo its size) reach the disk.
"""

import os
import random
import secrets
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.end_to_end.commands import kill, run, start


def seeded() -> random.Random:
    """The source of all moments, its seed printed."""
    seed = int(os.environ.get("KILL_SEED", secrets.randbits(32)))
    print(f"KILL_SEED={seed}")
    return random.Random(seed)


@dataclass
class KilledCommand:
    """A verb that is to survive kills.

    Attributes:
        verb: its name.
        driver: a program that runs it and dies inside a write.
        writes: of a run; the fatal one is drawn among them.
        arguments: output → what follows the verb.
        finish: (arguments, chance) → runs it to its end, perhaps on other ranks.
        check: output → compares it with the undisturbed one.
    """

    verb: str
    driver: Path
    writes: int
    arguments: Callable[[Path], list[str]]
    finish: Callable[[list[str], random.Random], None]
    check: Callable[[Path], None]
    longest_life: float = 1.0
    """Seconds that a process of it has lived so far: kills at any time are spread over that and a little more."""

    def survive(self, folder: Path, kills: int, in_a_write: int) -> None:
        """Kills, one after another on one output until it is there, then on the next one; the first inside writes."""
        chance, struck, inside, number = seeded(), 0, 0, 0
        while struck < kills:
            output = folder / f"output{number}"
            number += 1
            while struck < kills and not output.exists():
                died = self._dies_in_a_write if inside < in_a_write else self._dies_at_any_time
                hit = died(self.arguments(output), chance)
                inside += hit and inside < in_a_write
                struck += hit
            self.finish(self.arguments(output), chance)
            self.check(output)
            assert not list(folder.glob("*.partial")) and not list(folder.glob("*.tmp-*"))
        assert inside >= in_a_write

    def _dies_in_a_write(self, arguments: list[str], chance: random.Random) -> bool:
        began = time.monotonic()
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("DIE_AT", str(chance.randint(1, self.writes)))
            patch.setenv("DIE_AFTER_BYTES", str(chance.randrange(1 << 16)))
            ended = run(self.verb, *arguments, program=self.driver)
        self.longest_life = max(self.longest_life, time.monotonic() - began)
        assert ended.status in (0, -9), ended.stderr
        return ended.status == -9

    def _dies_at_any_time(self, arguments: list[str], chance: random.Random) -> bool:
        process = start(self.verb, *arguments)
        try:
            process.wait(chance.uniform(0.2, 1.2 * self.longest_life))
            return False
        except subprocess.TimeoutExpired:
            return True
        finally:
            kill(process)
