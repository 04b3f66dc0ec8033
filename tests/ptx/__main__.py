"""Runs all cases of the GPU kernels' PTX that have no record yet, and writes the log."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from ptx.cuda_build import CACHE, ROOT, BuildError
from ptx.jobs import CUDA_ARCHITECTURES, TRITON_ARCHITECTURES, Part, emulator_digest
from ptx.log import Log
from ptx.runner import GOOD, Run, environment_of, report, run_part, say

RESULTS = ROOT / "benchmarks" / "results" / "ptx.json"


def triton_version(folder: str | None) -> str:
    """The version of a Triton in a folder, or of that which is installed; empty where there is none."""
    command = [sys.executable, "-c", "import triton; print(triton.__version__)"]
    result = subprocess.run(command, env=environment_of(folder), capture_output=True, text=True)
    return result.stdout.strip()


def all_parts(triton_at: list[str]) -> dict[Part, str | None]:
    """Every part, with the folder of the Triton that it takes."""
    parts: dict[Part, str | None] = {Part("damage-cuda", 90): None}
    parts |= {Part("cuda", architecture): None for architecture in CUDA_ARCHITECTURES}
    for folder in (None, *triton_at):
        version = triton_version(folder)
        if not version:
            say(f"no Triton {f'in {folder}' if folder else 'is installed'}: its parts are left out")
            continue
        if folder is None:
            parts[Part("damage-triton", 90, version)] = None
        architectures = TRITON_ARCHITECTURES if folder is None else (90,)
        parts |= {Part("triton", architecture, version): folder for architecture in architectures}
    return parts


def drop_stale_records(log: Log, labels: set[str]) -> None:
    """Drop what no longer holds of parts that cannot run here: of a Triton that was named another time."""
    for label in sorted(set(log.records) - labels):
        run = Run(log, Part.of_label(label), 1)
        if run.pending:
            say(f"{label}: {len(run.pending)} to run, left out: name its Triton by --triton-at")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m ptx", description=__doc__)
    parser.add_argument("--parts", nargs="+", metavar="PART", help="only those whose names begin so")
    parser.add_argument(
        "--triton-at",
        action="append",
        default=[],
        metavar="FOLDER",
        help="that of another Triton, for its parts",
    )
    parser.add_argument(
        "--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes (default: all)"
    )
    parser.add_argument("--every", type=int, default=1, metavar="N", help="only every Nth of what is to run")
    parser.add_argument("--log", type=Path, default=RESULTS, help="what is written, and continued")
    parser.add_argument("--list", action="store_true", help="print the parts and how much of each is to run")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    CACHE.mkdir(parents=True, exist_ok=True)
    log, began, bad = Log(options.log, emulator_digest()), time.monotonic(), 0
    parts = all_parts(options.triton_at)
    drop_stale_records(log, {part.label for part in parts})
    for part, folder in parts.items():
        if options.parts and not part.label.startswith(tuple(options.parts)):
            continue
        say(f"{part.label} ({time.monotonic() - began:.0f} s)")  # before its kernels are compiled
        run = Run(log, part, options.every)
        say(f"  {len(run.pending)} to run")
        if options.list:
            continue
        run_part(run, log, folder, options.jobs)
        report(log, part)
        bad += sum(count for verdict, count in log.counts(part.label).items() if verdict not in GOOD)
    say(f"{bad} not as they should be, {time.monotonic() - began:.0f} s")
    return min(bad, 1)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BuildError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit("stopped; what has run is in the log, and the same command goes on from there")
