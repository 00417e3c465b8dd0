"""Speed and memory of the corpus tools, side by side with alternatives; one module per question.

    python benchmarks/bench_corpus.py [--quick] [--only tokenise,select] [--output benchmarks/results/corpus.json]

An existing record keeps the parts that are not measured; every part says where and when it was measured. Every
``benchmarks/bench_corpus_<name>.py`` is one sub-benchmark: ``measure(quick, folder)`` yields its rows (plain mappings)
as they are measured, ``describe(row)`` returns the line to print for one. ``folder`` is empty, on the disk of
``--scratch``, and removed afterwards.
"""

import argparse
import importlib
import json
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.provenance import provenance  # noqa: E402

PREFIX = "bench_corpus_"


def main() -> None:
    """Run the chosen sub-benchmarks; print and record their figures."""
    names = available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small inputs: seconds instead of minutes, rougher ratios")
    parser.add_argument("--only", default=",".join(names), help=f"of {', '.join(names)}")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--scratch", type=Path, help="where temporary files go; by default the system's")
    options = parser.parse_args()
    chosen = options.only.split(",")
    if unknown := [name for name in chosen if name not in names]:
        parser.error(f"--only {', '.join(unknown)}: choose of {', '.join(names)}")
    measured = {}
    for name in chosen:
        origin = provenance()
        measured[name] = {"quick": options.quick, "provenance": origin, "rows": run_one(name, options)}
        if options.output is not None:
            record(options.output, measured)
    sys.exit(any(row.get("failed") for part in measured.values() for row in part["rows"]))


def record(path: Path, measured: dict[str, Any]) -> None:
    """Add parts to a record, replacing those of the same name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    before = json.loads(path.read_text())["results"] if path.exists() else {}
    results = dict(sorted({**before, **measured}.items()))
    path.write_text(json.dumps({"benchmark": "corpus", "results": results}, indent=2) + "\n")


def available() -> list[str]:
    """Return the names of the sub-benchmarks."""
    return sorted(path.stem.removeprefix(PREFIX) for path in Path(__file__).parent.glob(f"{PREFIX}*.py"))


def run_one(name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Run one sub-benchmark and return its rows; a failure does not stop the others."""
    module = importlib.import_module(f"benchmarks.{PREFIX}{name}")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=options.scratch, prefix=f"bench-{name}-") as folder:
        try:
            for row in module.measure(options.quick, Path(folder)):
                rows.append(row)
                sys.stdout.write(f"{name:<10} {module.describe(row)}\n")
                sys.stdout.flush()
        except Exception as error:  # noqa: BLE001 - reported, and the exit status says so
            traceback.print_exc()
            rows.append({"failed": f"{type(error).__name__}: {error}"})
    return rows


if __name__ == "__main__":
    main()
