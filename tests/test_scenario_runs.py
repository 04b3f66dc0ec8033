"""Sweeps over a scenario: a folder each run, gone on with after a kill, the same bytes as without one."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_runs import SHORT, dolly_rows, leave_out_pictures, write_lines, write_llama

from fedkseed import cli
from fedkseed.files import FolderLock
from fedkseed.scenarios import run as scenario_run
from fedkseed.scenarios.experiments import runner
from fedkseed.scenarios.experiments.runner import SCENARIO
from fedkseed.scenarios.experiments.scenario import Planned, Scenario
from fedkseed.simulation.run_folder import BEST, CLIENTS, LEDGER, METRICS, SETTINGS

RUNS = [f"{variant}/seed-{seed}" for seed in (1, 2) for variant in ("fedkseed", "pro")]
#: Of a finished run, what a kill must not change.
SAME = (METRICS, LEDGER, BEST, CLIENTS, SETTINGS, "server.state", "fedkseed.json")
#: Of a summary, what differs from run to run.
APART = ("seconds", "peak_memory")


@pytest.fixture(autouse=True)
def _same_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model, data and a scenario of four runs."""
    monkeypatch.chdir(tmp_path)
    leave_out_pictures(monkeypatch)
    write_llama(Path("model"))
    write_lines(Path("dolly.jsonl"), dolly_rows(90, ("closed_qa", "open_qa", "summarization")))
    settings = "".join(f"{name} = {value}\n" for name, value in SHORT.items())
    Path("tiny.toml").write_text(
        f'title = "A tiny sweep"\nneeds = "rows"\nseeds = [1, 2]\n[settings]\n{settings}\n'
        '[variants.fedkseed]\n[variants.pro]\nsampling = "pro"\n'
    )
    return tmp_path


def sweep(*more: str) -> int:
    return cli.main(["scenarios", "run", "tiny.toml", "--model", "model", "--data", "dolly.jsonl", *more])


def content(out: Path) -> dict[str, Any]:
    """What has to be the same in every sweep, file by file."""
    found: dict[str, Any] = {}
    for run in RUNS:
        found.update({f"{run}/{name}": (out / run / name).read_bytes() for name in SAME})
        summary = json.loads((out / run / "summary.json").read_text())
        found[f"{run}/summary"] = {name: value for name, value in summary.items() if name not in APART}
    return found


def test_a_sweep_that_is_interrupted_goes_on_to_the_same_bytes(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep("--out", "whole") == 0
    printed = capsys.readouterr().out
    heads = [line for line in printed.splitlines() if line.startswith("== ")]
    assert [head.partition(";")[0] for head in heads] == [
        "== run 1 of 4: fedkseed, seed 1",
        "== run 2 of 4: pro, seed 1",
        "== run 3 of 4: fedkseed, seed 2",
        "== run 4 of 4: pro, seed 2",
    ]
    assert [bool(re.search(r"; about .+ left$", head)) for head in heads] == [False, True, True, True]
    assert len(re.findall(r"^(?:fedkseed|pro), seed [12] took .+$", printed, re.MULTILINE)) == 4
    assert printed.endswith(f"compare {here.resolve() / 'whole'}\n")

    rows: list[str] = []
    original = scenario_run.round_row

    def row(result: Any) -> str:
        rows.append(original(result))
        if len(rows) == 3:  # the second run's first round is in the folder
            raise KeyboardInterrupt
        return rows[-1]

    with monkeypatch.context() as patch:
        patch.setattr(scenario_run, "round_row", row)
        assert sweep("--out", "cut") == 130
    capsys.readouterr()
    assert not (here / "cut" / RUNS[1] / "summary.json").exists()
    assert not (here / "cut" / RUNS[2]).exists()
    assert sweep("--out", "cut") == 0
    printed = capsys.readouterr().out
    assert "== run 1 of 4: fedkseed, seed 1 (finished)\n" in printed
    assert printed.count("Resuming") == 1
    assert "after 1 round\n" in printed
    assert content(here / "cut") == content(here / "whole")

    before = {path: path.stat().st_mtime_ns for path in (here / "cut").glob("*/*/*") if path.is_file()}
    assert sweep("--out", "cut") == 0
    assert capsys.readouterr().out.count("(finished)") == 4
    assert before == {path: path.stat().st_mtime_ns for path in before}, "nothing is written anew"


#: The command, which kills itself as the fifth round of all is to be kept: the second of the second run.
_KILLED_IN_ROUND_5 = """
import os, signal, sys
from fedkseed import cli
from fedkseed.simulation.kept_run import KeptRun

add, rounds = KeptRun.add, iter(range(5))

def add_or_die(self, *arguments):
    if next(rounds) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    add(self, *arguments)

KeptRun.add = add_or_die
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_sweep_that_is_killed_goes_on_to_the_same_bytes(here: Path) -> None:
    longer = ("--set", "num_rounds=3")
    assert sweep("--out", "whole", *longer) == 0
    command = [sys.executable, "-c", _KILLED_IN_ROUND_5, "scenarios", "run", "tiny.toml", "--out", "cut"]
    command += ["--model", "model", "--data", "dolly.jsonl", *longer]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, check=False)
    assert done.returncode == -signal.SIGKILL
    assert (here / "cut" / RUNS[0] / "summary.json").exists()
    assert (here / "cut" / RUNS[1] / METRICS).read_bytes().count(b"\n") == 1
    assert not (here / "cut" / RUNS[1] / "summary.json").exists()
    assert sweep("--out", "cut", *longer) == 0
    assert content(here / "cut") == content(here / "whole")


def test_a_run_of_a_sweep_is_that_of_simulate(here: Path) -> None:
    assert sweep("--out", "swept", "--only", "pro", "--seeds", "2") == 0
    flags = [text for name, value in SHORT.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    own = ["--model", "model", "--data", "dolly.jsonl", "--out", "alone", "--sampling", "pro", "--seed", "2"]
    assert cli.main(["simulate", *own, *flags]) == 0
    for name in SAME:
        assert (here / "swept/pro/seed-2" / name).read_bytes() == (here / "alone" / name).read_bytes(), name


def test_a_folder_holds_one_scenario_and_takes_more_of_it(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = Path("tiny.toml").read_text()
    assert sweep("--out", "out", "--only", "fedkseed", "--seeds", "1") == 0
    assert sweep("--out", "out", "--only", "fedkseed", "--seeds", "1", "--set", "lr=0.5") == 2
    assert "lr in [settings] is 0.5, was left out; name another folder" in capsys.readouterr().err
    assert sweep("--out", "out", "--only", "pro", "--seeds", "5", "--device", "cpu") == 0
    assert sorted(path.parent.name for path in (here / "out").glob("*/*/summary.json")) == [
        "seed-1",
        "seed-5",
    ]
    assert cli.main(["scenarios", "show", f"out/{SCENARIO}"]) == 0
    kept = capsys.readouterr().out
    assert "seeds = [1, 5]" in kept
    assert '[variants."fedkseed"]' in kept
    assert '[variants."pro"]' in kept
    for only in ("fedkseed,pro", "pro"):  # the order stays that of the file, titles are those of now
        Path("tiny.toml").write_text(tiny.replace("[variants.pro]", f'[variants.pro]\ntitle = "{only}"'))
        assert sweep("--out", "out", "--only", only, "--seeds", "1") == 0
        both = Scenario.read(here / "out" / SCENARIO).variants
        assert {name: entry.title for name, entry in both.items()} == {"fedkseed": "fedkseed", "pro": only}
        assert list(both) == ["fedkseed", "pro"]
    Path("tiny.toml").write_text(tiny.replace('"pro"', '"uniform"'))
    assert sweep("--out", "out", "--only", "pro", "--seeds", "5") == 2
    assert "sampling in [variants.pro] is uniform, was pro" in capsys.readouterr().err


def test_two_sweeps_do_not_share_a_folder(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "out").mkdir()
    with FolderLock(here / "out"):
        assert sweep("--out", "out") == 2
    assert "to itself, got one that this process works in already" in capsys.readouterr().err
    assert [path.name for path in (here / "out").iterdir()] == [FolderLock.FILE]


def test_a_call_that_begins_no_run_binds_no_folder(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    only = ("--out", "out", "--only", "fedkseed", "--seeds", "1")
    assert sweep(*only, "--data", "doly.jsonl") == 2
    assert "expected a file, got 'doly.jsonl'" in capsys.readouterr().err
    assert sweep(*only) == 0
    assert sweep(*only, "--data", "doly.jsonl") == 2
    assert "data in [settings] is doly.jsonl" in capsys.readouterr().err


def test_flags_need_not_suit_variants_that_are_left_out(here: Path) -> None:
    text = Path("tiny.toml").read_text().replace('sampling = "pro"', 'method = "first-order"')
    Path("tiny.toml").write_text(text)
    assert sweep("--out", "out", "--seeds", "1") == 0
    assert sweep("--out", "out", "--seeds", "1", "--workers", "2") == 2  # of a method with one worker
    assert sweep("--out", "out", "--seeds", "1", "--workers", "2", "--only", "fedkseed") == 0
    assert list(Scenario.read(here / "out" / SCENARIO).variants) == ["fedkseed", "pro"]


def test_a_run_that_fails_is_told_and_the_others_run(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = Path("tiny.toml").read_text().replace("[variants.pro]", "[variants.pro]\nclients_per_round = 9")
    Path("tiny.toml").write_text(text)
    assert sweep("--out", "out") == 2
    printed, told = capsys.readouterr()
    assert told.count("clients_per_round") == 1, "the same failure is told once"
    assert "pro, seed 1 failed: expected " in told
    assert "\npro, seed 2 failed as pro, seed 1 did\n" in told
    assert told.endswith("\n2 of 4 runs failed: pro, seed 1; pro, seed 2\n")
    assert printed.endswith(f"compare {here.resolve() / 'out'}\n")
    assert sorted((here / "out").glob("*/*")) == [here / "out/fedkseed/seed-1", here / "out/fedkseed/seed-2"]


def test_runs_that_all_failed_are_not_to_be_compared(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep("--out", "out", "--data", "absent.jsonl") == 2
    printed, told = capsys.readouterr()
    assert "compare" not in printed
    assert "got 'absent.jsonl', which is none; data names it, from the current folder\n" in told


def test_the_time_that_is_left_follows_from_the_variants_that_have_run() -> None:
    def left(*variants: str) -> list[Planned]:
        return [Planned(variant, 0, {}) for variant in variants]

    assert runner._time_left({}, left("a")) == ""
    assert runner._time_left({"a": 60, "b": 180}, left("a", "a", "b")) == "; about 5 min left"
    assert runner._time_left({"a": 60, "b": 180}, left("c")) == "; about 2 min left"


def test_a_device_that_is_not_there_is_refused_before_the_first_run(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep("--out", "out", "--device", "cuda:99") == 2
    printed, told = capsys.readouterr()
    assert "== run" not in printed
    assert told.count("cuda:99") == 1
    assert not (here / "out").exists()


def test_a_damaged_summary_is_written_anew(here: Path) -> None:
    assert sweep("--out", "out", "--only", "pro", "--seeds", "1") == 0
    summary = here / "out/pro/seed-1/summary.json"
    whole = json.loads(summary.read_text())
    summary.write_bytes(summary.read_bytes()[:100])
    assert sweep("--out", "out", "--only", "pro", "--seeds", "1") == 0
    again = json.loads(summary.read_text())
    assert {**again, **{name: whole[name] for name in APART}} == whole
