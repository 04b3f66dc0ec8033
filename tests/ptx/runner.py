"""Runs the jobs of a part that have no record, in processes of their own, and keeps the log."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from ptx.cuda_build import ROOT, build, readable_name, sources_in
from ptx.jobs import Job, Part, emulator_digest, host_digest, jobs_of
from ptx.log import Coverage, Log, Record, from_ranges
from ptx.missed import missed_places

GOOD = ("equal", "seen")
SECONDS_BETWEEN_SAVES = 20
SECONDS_BETWEEN_REPORTS = 60
SECONDS_OF_A_JOB = 900
MOST_CRASHES = 4
LEAST_SHARE = 0.85
LONGEST_DETAIL = 300


def say(text: str) -> None:
    print(text, flush=True)


def environment_of(folder: str | None) -> dict[str, str]:
    """The environment of a worker, with a folder's packages before all others."""
    path = [folder, str(ROOT), str(ROOT / "tests"), str(ROOT / "python"), os.environ.get("PYTHONPATH")]
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, path))}


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
        status = process.wait()
        self.close()
        return {
            "verdict": "crash",
            "detail": f"its process ended ({status}); it has {SECONDS_OF_A_JOB} s for a case",
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
            self._folder = build(part.architecture)
            texts = sources_in(self._folder)
            self._digests = {readable_name(symbol): source.digest for symbol, source in texts.items()}
        self._log.keep(part.label, self._jobs)
        self.pending = list(self._pending())[::every]

    def _key(self, job: Job, kernels: tuple[str, ...]) -> str:
        """Triton's kernels are known by what compiles them."""
        texts = sorted(f"{name}={self._digests.get(name)}" for name in kernels) if self._digests else []
        return hashlib.sha256("\n".join([self._base, job.definition, *texts]).encode()).hexdigest()[:8]

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
                return other.covering(label)
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

    def note_places(self) -> None:
        """Add to the log where the blocks are that never ran, of kernels whose sources are here."""
        if not self.part.is_cuda:
            return
        digests = self._log.kernels.get(self.part.label, {})
        missed = {name: self._log.coverage[digest].missed for name, digest in digests.items()}
        for name, places in missed_places(self._folder, missed).items():
            self._log.places[digests[name]] = places


def run_part(run: Run, log: Log, folder: str | None, num_jobs: int) -> None:
    """Run what is pending in so many processes; save, and say how far it is, now and then."""
    pending: queue.SimpleQueue[str] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[str, dict[str, Any]] | Exception | None] = queue.SimpleQueue()
    for name in run.pending:
        pending.put(name)
    workers = [Worker(run.part, folder) for _ in range(min(num_jobs, len(run.pending)))]

    def serve(worker: Worker) -> None:
        try:
            while True:
                name = pending.get_nowait()
                done.put((name, worker.run(name)))
        except queue.Empty:
            done.put(None)
        except Exception as error:  # raised where the outcomes are taken, which waits for this thread
            done.put(error)

    threads = [threading.Thread(target=serve, args=(worker,), daemon=True) for worker in workers]
    for thread in threads:
        thread.start()
    running, num_done, num_crashes = len(threads), 0, 0
    began = saved = reported = time.monotonic()
    try:
        while running:
            outcome = done.get()
            if isinstance(outcome, Exception):
                raise outcome
            if outcome is None:
                running -= 1
                continue
            record = run.note(*outcome)
            num_crashes = num_crashes + 1 if record.verdict == "crash" else 0
            if num_crashes == MOST_CRASHES:
                raise RuntimeError(f"{num_crashes} processes in a row ended with what they were to run")
            if record.verdict not in GOOD:
                say(f"  {record.verdict.upper()}: {outcome[0]}: {record.detail}")
            num_done, now = num_done + 1, time.monotonic()
            if now - saved > SECONDS_BETWEEN_SAVES:
                log.save()
                saved = now
            if now - reported > SECONDS_BETWEEN_REPORTS:
                say(f"  {num_done} of {len(run.pending)} ran, {now - began:.0f} s")
                reported = now
    finally:
        with contextlib.suppress(queue.Empty):  # or threads would start processes anew
            while True:
                pending.get_nowait()
        for worker in workers:
            worker.close()
        run.note_places()
        log.save()


def report(log: Log, part: Part) -> None:
    table = log.table(part.label)
    say(f"  {', '.join(f'{name} {value}' for name, value in table.items())}")
    if part.kind.startswith("damage"):
        return
    for name, digest in log.kernels.get(part.label, {}).items():
        coverage = log.coverage[digest]
        if coverage.share < LEAST_SHARE:
            ran = coverage.blocks - len(coverage.missed)
            say(f"  {name}: {ran} of {coverage.blocks} basic blocks ran")
        if coverage.notes:
            say(f"  {name}: {coverage.notes}")
