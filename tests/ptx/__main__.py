"""Runs all cases of the GPU kernels' PTX that have no record yet, and writes the log."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ptx.cuda_build import CACHE, ROOT, build, readable_name, sources_in
from ptx.jobs import (
    CUDA_ARCHITECTURES,
    TRITON_ARCHITECTURES,
    Job,
    Part,
    emulator_digest,
    host_digest,
    jobs_of,
)
from ptx.log import Coverage, Log, Record, from_ranges

RESULTS = ROOT / "benchmarks" / "results" / "ptx.json"
GOOD = ("equal", "seen")
SECONDS_BETWEEN_SAVES = 20
SECONDS_OF_A_JOB = 900
LEAST_SHARE = 0.85
LONGEST_DETAIL = 300


def say(text: str) -> None:
    print(text, flush=True)


def triton_version(folder: str | None) -> str:
    """The version of a Triton in a folder, or of that which is installed; empty where there is none."""
    command = [sys.executable, "-c", "import triton; print(triton.__version__)"]
    result = subprocess.run(command, env=environment_of(folder), capture_output=True, text=True)
    return result.stdout.strip()


def environment_of(folder: str | None) -> dict[str, str]:
    """The environment of a worker, with a folder's packages before all others."""
    path = [folder, str(ROOT), str(ROOT / "tests"), str(ROOT / "python"), os.environ.get("PYTHONPATH")]
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, path))}


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


class Worker:
    """A process of `ptx.worker`, which is started anew when it ended or took too long."""

    def __init__(self, part: Part, folder: str | None):
        self._command = [sys.executable, "-m", "ptx.worker", part.kind, str(part.architecture), part.version]
        self._environment = environment_of(folder)
        self._process: subprocess.Popen[str] | None = None

    def run(self, name: str) -> dict[str, Any]:
        if self._process is None:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=self._environment,
                text=True,
                start_new_session=True,  # an interrupt is this process's alone
            )
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        limit = threading.Timer(SECONDS_OF_A_JOB, process.kill)
        limit.start()
        try:
            process.stdin.write(f"{name}\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            limit.cancel()
        if line:
            made: dict[str, Any] = json.loads(line)
            return made
        self.close()
        return {
            "verdict": "crash",
            "detail": "its process ended",
            "seconds": 0,
            "instructions": 0,
            "kernels": {},
        }

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


class Run:
    """The jobs of one part that have no record."""

    def __init__(self, log: Log, part: Part, every: int):
        self.part, self._log = part, log
        self._jobs = jobs_of(part)
        self._base = f"{emulator_digest()} {host_digest(part)}"
        self._digests: dict[str, str] = {}
        if part.is_cuda:
            texts = sources_in(build(part.architecture))
            self._digests = {readable_name(symbol): source.digest for symbol, source in texts.items()}
        self._log.keep(part.label, self._jobs)
        self.pending = list(self._pending())[::every]

    def _key(self, job: Job, kernels: tuple[str, ...]) -> str:
        """Triton's kernels are known by what compiles them."""
        texts = sorted(f"{name}={self._digests.get(name)}" for name in kernels) if self._digests else []
        return hashlib.sha256("\n".join([self._base, job.definition, *texts]).encode()).hexdigest()[:10]

    def _pending(self) -> Iterator[str]:
        for name, job in self._jobs.items():
            own = self._log.records[self.part.label].get(name)
            if own is not None and own.key == self._key(job, own.kernels) and own.verdict in GOOD:
                continue
            if (covered := self._covered(name, job)) is not None:
                self._log.add(self.part.label, name, covered)
            else:
                self._log.records[self.part.label].pop(name, None)
                yield name

    def _covered(self, name: str, job: Job) -> Record | None:
        """A record of the same case with kernels of the same text, from another architecture's part."""
        for label, records in self._log.records.items():
            other = records.get(name)
            if other is None or label == self.part.label or other.covered_by or other.verdict not in GOOD:
                continue
            if other.key == self._key(job, other.kernels):
                for kernel in other.kernels:
                    self._log.kernels.setdefault(self.part.label, {})[kernel] = self._digests[kernel]
                return other._replace(seconds=0.0, instructions=0, detail="", covered_by=label)
        return None

    def note(self, name: str, outcome: dict[str, Any]) -> Record:
        kernels = tuple(outcome["kernels"])
        detail = "" if outcome["verdict"] == "equal" else outcome["detail"][-LONGEST_DETAIL:]
        numbers = outcome["seconds"], outcome["instructions"]
        record = Record(outcome["verdict"], self._key(self._jobs[name], kernels), *numbers, kernels, detail)
        self._log.add(self.part.label, name, record)
        for kernel, (digest, blocks, missed, notes) in outcome["kernels"].items():
            coverage = Coverage(blocks, from_ranges(missed), notes)
            self._log.add_coverage(self.part.label, kernel, digest, coverage)
        return record


def run_part(run: Run, log: Log, folder: str | None, num_jobs: int) -> None:
    """Run what is pending in so many processes; save now and then."""
    pending: queue.SimpleQueue[str] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[str, dict[str, Any]] | None] = queue.SimpleQueue()
    for name in run.pending:
        pending.put(name)
    workers = [Worker(run.part, folder) for _ in range(min(num_jobs, len(run.pending)))]

    def serve(worker: Worker) -> None:
        while True:
            try:
                name = pending.get_nowait()
            except queue.Empty:
                done.put(None)
                return
            done.put((name, worker.run(name)))

    threads = [threading.Thread(target=serve, args=(worker,), daemon=True) for worker in workers]
    for thread in threads:
        thread.start()
    running, saved = len(threads), time.monotonic()
    try:
        while running:
            outcome = done.get()
            if outcome is None:
                running -= 1
                continue
            record = run.note(*outcome)
            if record.verdict not in GOOD:
                say(f"  {record.verdict.upper()}: {outcome[0]}: {record.detail}")
            if time.monotonic() - saved > SECONDS_BETWEEN_SAVES:
                log.save()
                saved = time.monotonic()
    finally:
        for worker in workers:
            worker.close()
        log.save()


def report(log: Log, part: Part) -> None:
    table = log.table(part.label)
    say(f"  {', '.join(f'{name} {value}' for name, value in table.items())}")
    for name, digest in log.kernels.get(part.label, {}).items():
        coverage = log.coverage[digest]
        if coverage.share < LEAST_SHARE:
            ran = coverage.blocks - len(coverage.missed)
            say(f"  {name}: {ran} of {coverage.blocks} basic blocks ran")
        if coverage.notes:
            say(f"  {name}: {coverage.notes}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m ptx", description=__doc__)
    parser.add_argument("--parts", nargs="+", metavar="PART", help="only those whose names begin so")
    parser.add_argument(
        "--triton-at", action="append", default=[], metavar="FOLDER", help="another Triton (see docs)"
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
    for part, folder in all_parts(options.triton_at).items():
        if options.parts and not part.label.startswith(tuple(options.parts)):
            continue
        run = Run(log, part, options.every)
        say(f"{part.label}: {len(run.pending)} to run ({time.monotonic() - began:.0f} s)")
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
    except KeyboardInterrupt:
        sys.exit("stopped; what has run is in the log, and the same command goes on from there")
