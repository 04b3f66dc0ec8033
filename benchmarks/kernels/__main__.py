"""Runs every kernel benchmark and writes JSON and Markdown: `python -m benchmarks.kernels --help`."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import fedkseed_kernels
from benchmarks.common import environment, memory
from benchmarks.common.constants import DTYPES
from benchmarks.common.places import RESULTS_FOLDER
from benchmarks.kernels import report, results
from benchmarks.kernels.settings import Settings, make_settings
from benchmarks.kernels.weights import num_parameters
from fedkseed._extras import MissingExtraError, require_extra

SUITE = "benchmarks/kernels/bench_kernels.py"

# A rebuild of many seeds is measured on a smaller tensor, which a temporary would still show.
_MEMORY_ELEMENTS = {"smollm2": 1 << 26, "tiny": 1 << 20}
_MEMORY_ELEMENTS_MANY_SEEDS = 1 << 20


def run_suite(arguments: list[str]) -> list[dict[str, Any]]:
    """Runs the suite in a process of its own and returns its rows; SystemExit when a test of it fails.

    Raises:
        MissingExtraError: the suite's runner, of the extra `bench`, is not installed.
    """
    require_extra("bench", "pytest", "pytest_benchmark")
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "pytest-benchmark.json"
        command = [sys.executable, "-m", "pytest", SUITE, "-q", f"--benchmark-json={raw}"]
        command += ["--benchmark-columns=median,iqr,rounds", "-p", "no:cacheprovider", *arguments]
        done = subprocess.run(command, cwd=environment.REPOSITORY, check=False)
        if done.returncode != 0:
            raise SystemExit(
                f"expected {SUITE} to pass, got exit status {done.returncode}; nothing was written"
            )
        return results.rows_of(json.loads(raw.read_text()))


def measure_memory(settings: Settings) -> list[dict[str, Any]]:
    """Peak growth of a perturbation, two rebuilds and the control; empty where it cannot be measured."""
    if not memory.can_measure():
        return []
    num_elements = _MEMORY_ELEMENTS[settings.model]
    many = min(_MEMORY_ELEMENTS_MANY_SEEDS, num_elements)
    smallest, largest = min(settings.rebuild_seeds), max(settings.rebuild_seeds)
    planned = [("perturb", num_elements, 1), ("rebuild", num_elements, smallest)]
    planned += [("rebuild", many, largest), ("randn_like", num_elements, 1)]
    return [
        {
            "operation": operation,
            "num_elements": size,
            "num_seeds": num_seeds,
            "dtype": settings.dtype,
            "tensor_bytes": size * DTYPES[settings.dtype].itemsize,
            "growth_bytes": memory.measure(
                operation, size, num_seeds=num_seeds, dtype=settings.dtype, num_threads=settings.num_threads
            ),
        }
        for operation, size, num_seeds in planned
    ]


def command_line(arguments: argparse.Namespace) -> str:
    """The command, without the folder that its results went to: a path of the machine."""
    words = ["python -m benchmarks.kernels", f"--threads {arguments.threads}", f"--dtype {arguments.dtype}"]
    words += [f"--seeds {arguments.seeds}"] if arguments.seeds else []
    return " ".join([*words, "--quick"] if arguments.quick else words)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument(
        "--threads", type=int, default=Settings.num_threads, help="threads of every contestant"
    )
    parser.add_argument(
        "--dtype", choices=sorted(DTYPES), default=Settings.dtype, help="dtype of the weights"
    )
    parser.add_argument("--seeds", default="", help="values of K of the rebuilds, separated by commas")
    parser.add_argument(
        "--quick", action="store_true", help="tiny shapes, printed and not kept: a smoke test"
    )
    parser.add_argument("--output", type=Path, help=f"folder of the results (default {RESULTS_FOLDER.name}/)")
    arguments = parser.parse_args()

    if not arguments.quick and (reason := fedkseed_kernels.unavailable("native", "cpu")) is not None:
        parser.error(
            f"expected the native library, got none: {reason}; NumPy would take days (--quick runs on it)"
        )
    settings = make_settings(
        quick=arguments.quick, dtype=arguments.dtype, num_threads=arguments.threads, seeds=arguments.seeds
    )
    options = ["--bench-threads", str(arguments.threads), "--bench-dtype", arguments.dtype]
    options += ["--bench-seeds", arguments.seeds] if arguments.seeds else []
    options += ["--bench-quick"] if arguments.quick else []

    described = environment.describe(settings.num_threads)
    try:
        rows = run_suite(options)
    except MissingExtraError as error:
        parser.error(str(error))
    document: results.Document = {
        "schema": results.SCHEMA_VERSION,
        "command": command_line(arguments),
        "environment": {**described, "load_average_after": environment.load_average()},
        "settings": asdict(settings),
        "num_parameters": num_parameters(settings.model),
        "rows": rows,
        "memory": measure_memory(settings),
    }
    if arguments.quick and arguments.output is None:
        print(report.build(document))
        return
    path = results.write(document, arguments.output or RESULTS_FOLDER)
    written = report.write(path)
    print(written.read_text())
    print(f"Written: {path}, {written}")


if __name__ == "__main__":
    main()
