"""The tools as a shell runs them: real processes, their exit status and output."""

import os
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable

REPOSITORY = Path(__file__).resolve().parents[2]
SMALL = ["model.name=qwen_toy_reference", "training.global_batch_size=16", "training.micro_batch_size=8"]


@dataclass(frozen=True)
class Finished:
    """How a command ended."""

    status: int
    stdout: str
    stderr: str

    @property
    def lines(self) -> list[str]:
        """Lines on stderr, without those of progress bars and torchrun."""
        return [
            line
            for line in self.stderr.replace("\r", "\n").splitlines()
            if line.strip() and "step/s" not in line and not line.startswith(("E1", "W1", "I1", "E0", "W0"))
        ]


def environment() -> dict[str, str]:
    """The environment of a tool: one thread per process, and no variables of a torchrun around the tests."""
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return {**kept, "OMP_NUM_THREADS": "1"}


def start(verb: str, *arguments: str, ranks: int = 1, program: Path | None = None, **options: Any) -> subprocess.Popen:
    """Start ``tools/<verb>.py``, under torchrun for more than one rank, in its own session."""
    script = str(program or REPOSITORY / "tools" / f"{verb}.py")
    launcher = [] if ranks == 1 else ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return subprocess.Popen(
        [sys.executable, *launcher, script, *arguments],
        cwd=REPOSITORY,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **options,
    )


def start_ranks(verb: str, *arguments: str, ranks: int, logs: Path) -> list[subprocess.Popen]:
    """Start every rank as a process, without torchrun; each writes its stderr to ``logs/stderr-<rank>``."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(ranks):
        variables = dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks),
                         MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))  # fmt: skip
        with open(logs / f"stderr-{rank}", "w") as log:
            processes.append(subprocess.Popen(
                [sys.executable, f"tools/{verb}.py", *arguments], cwd=REPOSITORY, env={**environment(), **variables},
                stdout=subprocess.DEVNULL, stderr=log, start_new_session=True,
            ))  # fmt: skip
    return processes


def run(
    verb: str,
    *arguments: str,
    ranks: int = 1,
    timeout: float = 240,
    program: Path | None = None,
    before: Callable[[], None] | None = None,
) -> Finished:
    """Run a tool to its end; ``before`` is called in the child before it starts."""
    process = start(verb, *arguments, ranks=ranks, program=program, preexec_fn=before)
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        kill(process)
        raise AssertionError(f"{verb} {' '.join(arguments)} did not end in {timeout} s") from None
    finally:
        kill(process)
    return Finished(process.returncode, stdout, stderr)


def kill(process: subprocess.Popen) -> None:
    """Send SIGKILL to a command and everything that it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()
