"""A run's folder: taken before anything is written, never overwritten, never a dead end."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.federation import CONFIG, make_task
from torch import nn

from fedkseed import Ledger, Simulation, SimulationConfig
from fedkseed.federation.state import StateError
from fedkseed.files import FolderInUseError, FolderLock, FolderNotEmptyError, LockLostError
from fedkseed.simulation.best_ledger import OLDER_BEST
from fedkseed.simulation.round_log import RoundLog, check_metrics, read_rounds
from fedkseed.simulation.run_folder import (
    BEST,
    CLIENTS,
    LEDGER,
    METRICS,
    SETTINGS,
    TIMINGS,
    RunFolder,
    RunFolderError,
)
from fedkseed.simulation.simulation import RoundResult

STATE, OLDER = "server.state", "server.state.1"
SAME = (STATE, LEDGER, METRICS, CLIENTS, BEST)


def run(folder: Path | RunFolder, num_rounds: int = 3, **options: Any) -> Simulation[Any, Any]:
    """A run to its end; closed."""
    config = SimulationConfig(**{**CONFIG, "num_rounds": num_rounds})
    with Simulation(options.pop("task", None) or make_task(), config, folder=folder, **options) as simulation:
        for _ in simulation.rounds():
            pass
    return simulation


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def scored(*scores: float) -> Any:
    """The task, with these held-out losses."""

    def evaluate(_: nn.Module, round: int) -> Mapping[str, float]:
        return {"held_out_loss": scores[round]}

    return replace(make_task(), evaluate=evaluate)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    run(folder)
    return folder


def test_a_folder_is_locked_before_anything_is_written_and_given_back_whole(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "1"
    with RunFolder.start(path) as folder:
        assert not folder.resumes
        assert os.listdir(path) == [".lock"]
        with pytest.raises(FolderInUseError):
            RunFolder.start(path)
        folder.write_settings({"lr": 1e-3, "prompt": "é"})
        with pytest.raises(FolderNotEmptyError, match=f"--resume {path}"):
            RunFolder.start(path)
        with pytest.raises(FolderInUseError):
            RunFolder.reopen(path)
        folder.abandon()
    assert os.listdir(tmp_path) == []


def test_abandon_takes_back_what_start_made_alone(tmp_path: Path, whole: Path) -> None:
    (tmp_path / "mine").mkdir()
    folder = RunFolder.start(tmp_path / "mine" / "run")
    folder.write_settings({})
    (folder.path / "notes.txt").touch()
    folder.abandon()
    assert os.listdir(tmp_path / "mine" / "run") == ["notes.txt"]
    shutil.copytree(whole, tmp_path / "run")
    before = files(tmp_path / "run")
    RunFolder.reopen(tmp_path / "run").abandon()
    started = RunFolder.start(tmp_path / "new")
    run(started, 1)
    started.abandon()
    assert (tmp_path / "new" / STATE).exists()
    assert files(tmp_path / "run") == before
    RunFolder.reopen(tmp_path / "new").close()


def test_start_refuses_another_folder_and_writes_nothing_there(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    for path in (tmp_path, tmp_path / "file", tmp_path / "link"):
        with pytest.raises(FolderNotEmptyError, match="expected a new or an empty folder for the run"):
            RunFolder.start(path)
        with pytest.raises(RunFolderError, match=r"expected the folder of a run"):
            RunFolder.reopen(path)
    with pytest.raises(RunFolderError):
        RunFolder.reopen(tmp_path / "absent")
    assert sorted(os.listdir(tmp_path)) == ["file", "link"]
    # What a start that was killed left is no content.
    (tmp_path / "empty").mkdir()
    for name in (".lock", ".settings.json.12-12.tmp"):
        (tmp_path / "empty" / name).touch()
    RunFolder.start(tmp_path / "empty").close()
    assert os.listdir(tmp_path / "empty") == [".lock"]


def test_a_folder_that_was_filled_before_its_lock_was_there_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another start writes its settings and ends between our look into the folder and our lock."""
    enter = FolderLock.__enter__

    def late(lock: FolderLock) -> FolderLock:
        monkeypatch.setattr(FolderLock, "__enter__", enter)
        with RunFolder.start(lock.folder) as other:
            other.write_settings({"whose": "other"})
        return enter(lock)

    monkeypatch.setattr(FolderLock, "__enter__", late)
    with pytest.raises(FolderNotEmptyError, match="--resume"):
        RunFolder.start(tmp_path / "run")
    with RunFolder.reopen(tmp_path / "run") as folder:
        assert folder.read_settings() == {"whose": "other"}


def test_a_run_that_was_killed_before_its_first_state_begins_at_round_0(tmp_path: Path, whole: Path) -> None:
    with RunFolder.start(tmp_path / "run") as folder:
        folder.write_settings({"a": [1, None, "x"]})
    with RunFolder.reopen(tmp_path / "run") as folder:
        assert not folder.resumes
        assert folder.read_settings() == {"a": [1, None, "x"]}
        run(folder, 1)
    with RunFolder.reopen(tmp_path / "run") as folder:
        assert folder.resumes
        run(folder)
        folder.lock.check()  # stays the caller's
    for name in SAME:
        assert (tmp_path / "run" / name).read_bytes() == (whole / name).read_bytes(), name


@pytest.mark.parametrize(
    "text", ["", "[]", "null", "{", '{"a": NaN}', '{"a": 1, "a": 2}', "[" * 100_000, "x" * (1 << 21)]
)
def test_settings_are_checked_as_a_document(tmp_path: Path, text: str) -> None:
    (tmp_path / SETTINGS).write_text(text)
    with RunFolder.reopen(tmp_path) as folder, pytest.raises(RunFolderError, match=SETTINGS) as caught:
        folder.read_settings()
    assert len(str(caught.value)) < 600
    for bad in ({"a": float("nan")}, {"a": "x" * (1 << 21)}, {"a": [[]] * 9, "b": "\ud800"}):
        with RunFolder.reopen(tmp_path) as folder, pytest.raises(ValueError, match=r"."):
            folder.write_settings(bad)
    assert (tmp_path / SETTINGS).read_text() == text


def test_a_folder_that_lost_its_state_is_not_overwritten(tmp_path: Path, whole: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run" / STATE).unlink()
    (tmp_path / "run" / OLDER).unlink()
    before = files(tmp_path / "run")
    for resume in (None, False, True):
        with pytest.raises(RunFolderError, match=r"expected server\.state beside ledger\.safetensors"):
            run(tmp_path / "run", resume=resume)
    (tmp_path / "run" / SETTINGS).write_text("{}")
    with pytest.raises(RunFolderError, match="not overwritten"):
        RunFolder.reopen(tmp_path / "run")
    (tmp_path / "run" / SETTINGS).unlink()
    assert files(tmp_path / "run") == before


@pytest.mark.parametrize("damage", ["gone", "cut", "flipped"])
def test_a_run_goes_on_with_the_older_state_and_everything_is_cut_back_to_it(
    tmp_path: Path, whole: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "run"
    run(path, 2)
    data = bytearray((path / STATE).read_bytes())
    data[-40] ^= 1
    (path / STATE).write_bytes(data[:-1] if damage == "cut" else data)
    if damage == "gone":
        (path / STATE).unlink()
    with RunFolder.reopen(path) as folder:
        config = SimulationConfig(**{**CONFIG, "num_rounds": 3})
        with Simulation(make_task(), config, folder=folder) as simulation:
            assert simulation.server.round == 1
            assert [len((path / name).read_text().splitlines()) for name in (METRICS, TIMINGS)] == [1, 1]
            assert Ledger.load(path / LEDGER).notes["num_rounds"] == "1"
            assert Ledger.load(path / BEST).notes["num_rounds"] == "1"
            assert "after 1 rounds" in folder.notice
            assert folder.notice in caplog.text
            assert len(list(simulation.rounds())) == 2
    for name in SAME:
        assert (path / name).read_bytes() == (whole / name).read_bytes(), name


def test_the_task_s_settings_are_compared_by_name(tmp_path: Path, whole: Path) -> None:
    task = {"prompt": "plain", "model": None, "labels": ("no", "yes"), "dtype": "float32"}
    run(tmp_path / "run", 1, task_settings=task)
    before = files(tmp_path / "run")
    assert json.loads(before[CLIENTS])["task"] == {**task, "labels": ["no", "yes"]}
    for other, said in (
        ({**task, "prompt": "chat"}, "with prompt plain, which the run in .* began with, got chat"),
        ({"model": None}, "with prompt plain, .*, got none"),
        ({}, "with prompt plain, .*, got none"),
    ):
        with pytest.raises(StateError, match=said):
            run(tmp_path / "run", resume=True, task_settings=other)
    assert files(tmp_path / "run") == before
    run(tmp_path / "run", resume=True, task_settings={**task, "new in a later release": 1})
    # A run of before has none of them, and takes them.
    shutil.copytree(whole, tmp_path / "old")
    run(tmp_path / "old", resume=True, task_settings=task)
    assert json.loads((tmp_path / "old" / CLIENTS).read_text())["task"]["prompt"] == "plain"
    for bad in ({"a": float("nan")}, {"a": object()}, {"a": "x" * (1 << 21)}):
        with pytest.raises(ValueError, match="expected settings of a task"):
            run(tmp_path / "new", task_settings=bad)
    assert not (tmp_path / "new").exists()


def test_a_deleted_lock_file_is_noticed_before_anything_is_written(tmp_path: Path) -> None:
    config = SimulationConfig(**CONFIG)
    with Simulation(make_task(), config, folder=tmp_path) as simulation:
        next(simulation.rounds())
        (tmp_path / ".lock").unlink()
        before = files(tmp_path)
        with pytest.raises(LockLostError):
            next(simulation.rounds())
        assert files(tmp_path) == before


ROW = {
    "round": 0,
    "clients": [1, 2],
    "failed": [],
    "train_loss": 1.5,
    "evaluation": {"held_out_loss": None},
    "bytes_down": 1,
    "bytes_up": 1,
    "num_skipped": 0,
}
BAD_ROWS = [
    "null",
    "[1]",
    "7",
    '{"round": 0}',
    json.dumps({**ROW, "round": 7}),
    json.dumps({**ROW, "round": False}),
    json.dumps({**ROW, "round": 0.0}),
    json.dumps({**ROW, "more": 1}),
    json.dumps({**ROW, "clients": [-1]}),
    json.dumps({**ROW, "clients": [True]}),
    json.dumps({**ROW, "failed": {}}),
    json.dumps({**ROW, "bytes_up": 2**70}),
    json.dumps({**ROW, "bytes_up": 1.0}),
    json.dumps({**ROW, "train_loss": float("nan")}),
    json.dumps({**ROW, "train_loss": "1.5"}),
    json.dumps({**ROW, "evaluation": {"a": [1]}}),
    json.dumps({**ROW, "evaluation": {"a": True}}),
    json.dumps({**ROW, "evaluation": []}),
    "[" * 100_000,
    "[],[]," * 100_000,
]


@pytest.mark.parametrize("text", BAD_ROWS, ids=range(len(BAD_ROWS)))
def test_rows_are_checked_like_messages(tmp_path: Path, text: str) -> None:
    path = tmp_path / METRICS
    path.write_text(text + "\n")
    with pytest.raises(RunFolderError, match=r"expected a line a round in .*line 1") as caught:
        RoundLog(path, 1, check_metrics)
    assert len(str(caught.value)) < 600
    path.write_text(json.dumps(ROW) + "\n" + text + "\n")
    with pytest.raises(RunFolderError, match="line 2"):
        list(read_rounds(path))
    # A round that was cut off may have left anything.
    log = RoundLog(path, 1, check_metrics)
    log.append({**ROW, "round": 1})
    assert list(log.rows) == list(read_rounds(path)) == [ROW, {**ROW, "round": 1}]


def test_the_rows_of_metrics_are_those_of_a_result() -> None:
    kinds: dict[str, Any] = {entry: 0 for entry in RoundResult.__dataclass_fields__}
    result = RoundResult(**{**kinds, **{name: ROW[name] for name in ROW}})
    check_metrics(result.metrics)


def test_a_log_that_cannot_be_written_keeps_its_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / METRICS
    log = RoundLog(path, 0, check_metrics)
    log.append(ROW)
    before = path.read_bytes()

    def fail(_: int) -> None:
        raise OSError("no space")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space"):
        patch.setattr(os, "fsync", fail)
        log.append({**ROW, "round": 1})
    assert path.read_bytes() == before
    with pytest.raises(ValueError, match="in .*metrics.jsonl, got more"):
        log.append({**ROW, "round": 1, "evaluation": {"x" * (1 << 20): 1.0}})
    path.write_bytes(before[:-1])  # an editor took the last line feed
    log = RoundLog(path, 1, check_metrics)
    log.append({**ROW, "round": 1})
    assert [row["round"] for row in log.rows] == [0, 1]
    with pytest.raises(RunFolderError, match="3 in all, got 2"):
        RoundLog(path, 3, check_metrics)


def kept_rounds(folder: Path) -> list[str]:
    return [Ledger.load(folder / name).notes["num_rounds"] for name in (LEDGER, BEST)]


def test_the_best_ledger_is_that_of_the_lowest_loss_and_of_the_first_of_equals(tmp_path: Path) -> None:
    run(tmp_path / "run", 5, task=scored(3.0, 1.0, float("nan"), 1.0, 2.0))
    assert kept_rounds(tmp_path / "run") == ["5", "2"]
    run(tmp_path / "two", 2, task=scored(3.0, 1.0))
    assert (tmp_path / "run" / BEST).read_bytes() == (tmp_path / "two" / LEDGER).read_bytes()
    assert run(tmp_path / "run", 5, task=scored(), resume=True).best_round == 1
    assert run(tmp_path / "none", 1, task=replace(make_task(), evaluate=None)).best_round is None
    assert not (tmp_path / "none" / BEST).exists()


@pytest.mark.few(4)
@pytest.mark.parametrize("scores", [(3.0, 2.0, 1.0, 0.5), (3.0, 1.0, 2.0, 0.5), (3.0, 1.0, 2.0, 2.0)])
@pytest.mark.parametrize("is_damaged", [False, True])
@pytest.mark.parametrize("written", range(6))
def test_the_best_ledger_is_the_same_after_a_crash_between_any_two_files(
    tmp_path: Path, scores: tuple[float, ...], written: int, is_damaged: bool
) -> None:
    """The third round's files are written up to one of them, and maybe its state is damaged too."""
    path = tmp_path / "run"
    run(tmp_path / "whole", 4, task=scored(*scores))
    run(path, 2, task=scored(*scores))
    before = files(path)
    run(path, 3, task=scored(*scores), resume=True)
    later = files(path)
    in_order = [METRICS, TIMINGS, LEDGER, STATE, BEST]
    for name in in_order[written:]:
        (path / name).write_bytes(before[name])
    if written <= 3:
        (path / OLDER).write_bytes(before[OLDER])
    if written <= 4 and OLDER_BEST in before:
        (path / OLDER_BEST).write_bytes(before[OLDER_BEST])
    elif written <= 4 and OLDER_BEST in later:
        (path / OLDER_BEST).unlink()
    if is_damaged:
        (path / STATE).write_bytes(b"damaged")
    run(path, 4, task=scored(*scores), resume=True)
    for name in SAME:
        assert (path / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_a_run_of_before_keeps_the_best_from_the_next_better_round_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(tmp_path, 3, task=scored(3.0, 1.0, 2.0))
    for name in (BEST, OLDER_BEST):
        (tmp_path / name).unlink()
    caplog.set_level(logging.WARNING)
    assert run(tmp_path, 4, task=scored(0, 0, 0, 1.5), resume=True).best_round is None
    assert "no ledger of round 2" in caplog.text
    assert run(tmp_path, 5, task=scored(0, 0, 0, 0, 0.5), resume=True).best_round == 4
    assert kept_rounds(tmp_path) == ["5", "5"]
