"""``make quickstart``: from raw text to distilled students, each step a tool of ``tools/``.

    python examples/quickstart/run.py [--output FOLDER] [--processes N] [--all-methods]

Finished steps are skipped; an interrupted run continues. The steps are in megatron_kd/quickstart/recipe.py, their
settings in examples/quickstart/*.yaml, their logs in runs/quickstart/logs.
"""

import argparse
import os
import shutil
import signal
import sys
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

# The checkout takes precedence over an installed package.
from megatron_kd.data.workers import cpu_count  # noqa: E402
from megatron_kd.errors import EXIT_BAD_INPUT, UserError, disk_full  # noqa: E402
from megatron_kd.quickstart import recipe  # noqa: E402
from megatron_kd.quickstart.step_runner import ProgressDisplay, Schedule, StepFailed, StepRunner  # noqa: E402

MAX_PROCESSES = 4  # about 0.7 GB each
ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",  # one CPU core per step on every machine
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "PYTHONUNBUFFERED": "1",
    "PYTHONPATH": os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")])),
}


def main() -> int:
    """Run and report; return 0 if every check of the report holds, otherwise 1."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path.cwd(), help="folder that gets runs/quickstart (default: .)")
    parser.add_argument("--processes", type=int, default=min(MAX_PROCESSES, cpu_count()))
    parser.add_argument("--all-methods", action="store_true", help="add SeqKD, GKD, MiniLLM and DistiLLM (minutes)")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    os.chdir(options.output)
    signal.signal(signal.SIGTERM, interrupt)
    try:
        return quickstart(max(1, options.processes), options.all_methods)
    except StepFailed as failure:
        sys.stderr.write(f"\nquickstart: {failure}\n")
        return failure.status or 1
    except UserError as error:
        return refuse(error)
    except OSError as error:
        full = disk_full(error)
        if full is None:
            raise
        return refuse(full)
    except KeyboardInterrupt as stop:
        sys.stderr.write("\nquickstart: stopped; run it again to continue\n")
        return 128 + (stop.args[0] if stop.args else signal.SIGINT)


def interrupt(number: int, _: object) -> None:
    """Stop as on Ctrl-C, together with the running steps."""
    raise KeyboardInterrupt(number)


def refuse(error: UserError) -> int:
    """Print an error that the user can fix in one line, and return the exit status."""
    sys.stderr.write(f"\nquickstart: {error}\n")
    return EXIT_BAD_INPUT


def quickstart(processes: int, all_methods: bool) -> int:
    """Run every step and report; return the exit status."""
    started = time.monotonic()
    sys.stdout.write(f"Quickstart: {processes} steps at a time, results in {recipe.ROOT.absolute()}\n")
    display = ProgressDisplay(width=shutil.get_terminal_size().columns if sys.stdout.isatty() else None)
    steps = recipe.quickstart_steps(REPOSITORY, all_methods)
    runner = StepRunner(
        steps,
        state=recipe.ROOT / "state",
        logs=recipe.ROOT / "logs",
        processes=processes,
        environment=ENVIRONMENT,
        on_progress=display,
    )
    schedule = runner.run()
    display.finish()
    return report(schedule, time.monotonic() - started, all_methods)


def report(schedule: Schedule, seconds: float, all_methods: bool) -> int:
    """Write the report, print the table and the checks; return the exit status."""
    from megatron_kd.logs import silence_known_noise

    silence_known_noise()
    from megatron_kd.evaluation.report import result_table, write_report
    from megatron_kd.quickstart.results import collect_report

    result = collect_report(seconds, len(schedule.skipped), all_methods)
    write_report(recipe.ROOT, result)
    sys.stdout.write(f"\n{result_table(result)}\n\n")
    checks = result.checks()
    for check in checks:
        sys.stdout.write(f"{'ok ' if check.holds else 'NOT SO'} {check.claim}\n")
    skipped = f", {len(schedule.skipped)} steps done before" if schedule.skipped else ""
    sys.stdout.write(
        f"\n{recipe.ROOT / 'report.md'}, report.json, report.png, training.png; {seconds:.0f} s{skipped}\n"
    )
    return 0 if all(check.holds for check in checks) else 1


if __name__ == "__main__":
    sys.exit(main())
