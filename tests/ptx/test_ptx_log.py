"""The log of `make ptx`: records that hold, those that do not, and the committed one."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from ptx import runner, worker
from ptx.__main__ import RESULTS, drop_stale_records
from ptx.calls import Verdict
from ptx.jobs import CUDA_ARCHITECTURES, Job, Part, emulator_digest, host_digest
from ptx.log import Coverage, Log, Record, as_ranges, from_ranges
from ptx.missed import Place
from ptx.parser import Source

NUM_CASES = 3
PART, OTHER = Part("cuda", 90), Part("cuda", 80)


class World:
    """Parts of a few jobs, each of which launches the kernel of its number, with texts by architecture."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, path: Path):
        self.path = path
        self.definitions = {f"case {i}": f"definition {i}" for i in range(NUM_CASES)}
        self.texts = {
            part.architecture: {f"kernel_{i}": "ret;" for i in range(NUM_CASES)} for part in (PART, OTHER)
        }
        self.emulator, self.host, self.verdict = "emulator", "host", "equal"
        self.ran: list[str] = []
        monkeypatch.setattr(runner, "jobs_of", self.jobs_of)
        monkeypatch.setattr(runner, "emulator_digest", lambda: self.emulator)
        monkeypatch.setattr(runner, "host_digest", lambda part: self.host)
        monkeypatch.setattr(runner, "build", lambda architecture: architecture)
        monkeypatch.setattr(runner, "sources_in", self.sources_in)
        monkeypatch.setattr(runner, "missed_places", lambda folder, missed: {})
        monkeypatch.setattr(runner, "Worker", lambda part, folder: FakeWorker(self, part))

    def jobs_of(self, part: Part) -> dict[str, Job]:
        return {
            name: Job(definition, lambda driver: Verdict("equal", ""))
            for name, definition in self.definitions.items()
        }

    def sources_in(self, architecture: int) -> dict[str, Source]:
        texts = self.texts[architecture]
        return {name: Source(name, "", "", text, None) for name, text in texts.items()}

    def run(self, part: Part = PART, every: int = 1) -> list[str]:
        """What runs, by the command started anew."""
        log, self.ran = Log(self.path, self.emulator), []
        runner.run_part(runner.Run(log, part, every), log, None, 2)
        return sorted(self.ran)

    def saved(self) -> dict[str, Any]:
        data: dict[str, Any] = json.loads(self.path.read_text())
        return data


class FakeWorker:
    def __init__(self, world: World, part: Part):
        self._world, self._part = world, part

    def run(self, name: str) -> dict[str, Any]:
        self._world.ran.append(name)
        kernel = f"kernel_{name.split()[1]}"
        digest = self._world.sources_in(self._part.architecture)[kernel].digest
        outcome = {"verdict": self._world.verdict, "detail": "why", "seconds": 1.5, "instructions": 10}
        return {**outcome, "kernels": {kernel: [digest, 10, "2-4", {}]}}

    def close(self) -> None:
        pass


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> World:
    return World(monkeypatch, tmp_path / "ptx.json")


def test_ranges_of_numbers() -> None:
    assert as_ranges([9, 3, 5, 4]) == "3-5,9"
    assert from_ranges("3-5,9") == {3, 4, 5, 9}
    assert as_ranges([]) == ""
    assert from_ranges("") == set()


def test_what_has_run_is_not_run_again(world: World) -> None:
    assert world.run(every=2) == ["case 0", "case 2"]
    assert world.run() == ["case 1"]
    assert world.run() == []
    assert world.saved()["parts"]["cuda-sm90"]["equal"] == NUM_CASES


def test_a_changed_kernel_runs_again_with_its_cases(world: World) -> None:
    world.run()
    world.texts[90]["kernel_1"] = "bar.sync 0; ret;"
    assert world.run() == ["case 1"]


@pytest.mark.parametrize("what", ["emulator", "host"])
def test_another_emulator_or_host_code_makes_all_records_stale(world: World, what: str) -> None:
    world.run()
    setattr(world, what, "changed")
    assert world.run() == ["case 0", "case 1", "case 2"]


def test_a_changed_case_runs_again_and_one_that_is_gone_leaves_no_record(world: World) -> None:
    world.run()
    world.definitions["case 0"] = "another"
    del world.definitions["case 2"]
    assert world.run() == ["case 0"]
    assert set(world.saved()["cases"]) == {"case 0", "case 1"}


def test_what_was_not_equal_runs_again(world: World) -> None:
    world.verdict = "differs"
    assert len(world.run()) == NUM_CASES
    (entry,) = world.saved()["cases"]["case 0"]
    assert entry.startswith("differs ")
    assert entry.endswith(" 1.5 10 0 why")
    world.verdict = "equal"
    assert len(world.run()) == NUM_CASES
    assert world.run() == []


def test_kernels_of_the_same_text_are_covered_by_another_architecture(world: World) -> None:
    world.run()
    world.texts[80]["kernel_1"] = "bar.sync 0; ret;"
    assert world.run(OTHER) == ["case 1"]
    cases = world.saved()["cases"]
    assert [cases[f"case {i}"][1].startswith("= cuda-sm90") for i in range(NUM_CASES)] == [True, False, True]
    assert world.saved()["parts"]["cuda-sm80"]["ran here"] == 1
    assert world.run(OTHER) == []
    # Another host code makes both stale; what covered the one part has run, and covers it again.
    world.host = "changed"
    assert len(world.run()) == NUM_CASES
    assert world.run(OTHER) == ["case 1"]


def test_it_says_how_far_it_is(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runner, "SECONDS_BETWEEN_REPORTS", -1)
    world.run()
    said = capsys.readouterr().out.splitlines()
    assert said == [f"  {i} of {NUM_CASES} ran, 0 s" for i in range(1, NUM_CASES + 1)]


def test_what_a_worker_raises_ends_the_run(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(worker: FakeWorker, name: str) -> dict[str, Any]:
        if name == "case 1":
            raise OSError("no process")
        return whole_run(worker, name)

    whole_run = FakeWorker.run
    monkeypatch.setattr(FakeWorker, "run", run)
    with pytest.raises(OSError, match="no process"):
        world.run()
    assert "case 1" not in world.saved()["cases"]


@pytest.mark.parametrize(
    ("code", "status"), [("", "0"), ("input(); raise SystemExit(3)", "3"), ("input(); input()", "-9")]
)
def test_a_process_that_ends_or_takes_too_long_is_said_to(
    code: str, status: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "SECONDS_OF_A_JOB", 2)
    process = runner.Worker(PART, None)
    monkeypatch.setattr(process, "_command", [sys.executable, "-c", code])
    outcome = process.run("case")
    assert outcome["verdict"] == "crash"
    assert outcome["detail"] == f"its process ended ({status}); it has 2 s for a case"


def test_an_error_of_a_case_is_its_verdict() -> None:
    def fail(driver: Any) -> Verdict:
        raise KeyError("no such kernel")

    driver = mock.Mock(launches=[], num_instructions=0)
    driver.kernels.return_value = {}
    outcome = worker.run_job(driver, Job("definition", fail))
    assert outcome["verdict"] == "error"
    assert "in fail" in outcome["detail"]
    assert outcome["detail"].rstrip().endswith("KeyError: 'no such kernel'")


def test_records_of_a_part_that_cannot_run_here_are_dropped_with_what_they_rest_on(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    part = Part("triton", 90, "3.6.0")
    world.texts[90] = {f"kernel_{i}": "ret;" for i in range(NUM_CASES)}
    world.run(part)
    for host, held in (("host", NUM_CASES), ("changed", 0)):
        world.host = host
        log = Log(world.path, world.emulator)
        drop_stale_records(log, {PART.label})
        assert len(log.records[part.label]) == held
    assert "triton-3.6.0-sm90: 3 to run, left out" in capsys.readouterr().out


@pytest.mark.parametrize("part", [PART, Part("damage-cuda", 90), Part("damage-triton", 100, "3.10.0+git-1")])
def test_a_label_says_which_part_it_is(part: Part) -> None:
    assert Part.of_label(part.label) == part


def test_coverage_is_joined_and_belongs_to_a_text(tmp_path: Path) -> None:
    log = Log(tmp_path / "ptx.json", "emulator")
    log.add("part", "case", Record("equal", "key", kernels=("kernel",)))
    log.add_coverage("part", "kernel", "text 1", Coverage(10, {1, 2, 3}))
    log.add_coverage("part", "kernel", "text 1", Coverage(10, {2, 3, 4}, {"note": 1}))
    assert log.coverage["text 1"] == Coverage(10, {2, 3}, {"note": 1})
    log.add_coverage("part", "kernel", "text 2", Coverage(10, {5}))
    log.places = {"text 2": [Place(1, "few_terms.h:3", "why")], "text 1": [Place(2, "few_terms.h:4", "")]}
    log.save()
    assert not Log(tmp_path / "ptx.json", "another emulator").coverage
    read = Log(tmp_path / "ptx.json", "emulator")
    assert read.coverage == {"text 2": Coverage(10, {5})}
    assert read.places == {"text 2": [Place(1, "few_terms.h:3", "why")]}
    assert read.kernels == {"part": {"kernel": "text 2"}}


def test_the_digests_are_those_of_the_sources() -> None:
    assert len({emulator_digest(), host_digest(PART), host_digest(Part("triton", 90, "3.9.0"))}) == 3
    assert host_digest(PART) == host_digest(OTHER)


def test_the_committed_log() -> None:
    """All equal, every damage seen, and most of every kernel ran, of Triton where all cases are run."""
    assert RESULTS.stat().st_size < 1_000_000
    log = Log(RESULTS, json.loads(RESULTS.read_text())["emulator"])
    for part in log.records:
        assert set(log.counts(part)) == ({"seen"} if part.startswith("damage") else {"equal"}), part
    cuda = [f"cuda-sm{architecture}" for architecture in CUDA_ARCHITECTURES]
    assert all(len(log.records[part]) >= 666 for part in cuda)
    triton = [part for part in log.records if part.startswith("triton-") and part.endswith("-sm90")]
    assert len(triton) >= 2
    assert all(len(log.records[part]) >= 300 for part in triton)
    for part in (*cuda, *triton):
        shares = {name: log.coverage[digest].share for name, digest in log.kernels[part].items()}
        assert {name for name, share in shares.items() if share < runner.LEAST_SHARE} == set(), part
    assert sum(len(log.records[part]) for part in log.records if part.startswith("damage")) >= 20
