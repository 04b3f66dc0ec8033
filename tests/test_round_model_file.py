"""The round's model in a file: the next process finds it, half a model is none, no room means rebuilding."""

from __future__ import annotations

import errno
import os
import stat
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.small_model import make_model, same_bytes, weights_of
from torch import nn

from fedkseed import RoundModelFile, SeedPool, WorkingCopy
from fedkseed.files import folder_for_a_while

POOL = SeedPool(21, 32)
COEFFICIENTS = np.random.default_rng(1).normal(scale=0.01, size=32).astype(np.float32)


def mixed_model() -> nn.Module:
    """Weights of two dtypes and odd sizes, one of them frozen."""
    model = make_model(torch.float32)
    model.append(nn.Linear(1, 3, dtype=torch.bfloat16))
    model[0].bias.requires_grad_(False)
    return model


def copy(folder: Path, model: nn.Module | None = None) -> WorkingCopy:
    """A working copy as a new process has it."""
    return WorkingCopy(model or mixed_model(), round_model=RoundModelFile(folder))


def load(
    working: WorkingCopy, coefficients: Any = COEFFICIENTS, pool: SeedPool = POOL, **options: Any
) -> bool:
    """Loads a round's model; says whether it was rebuilt."""
    before = working.seconds_rebuild
    working.load(pool, coefficients, **options)
    return working.seconds_rebuild > before


def expected(coefficients: Any = COEFFICIENTS, pool: SeedPool = POOL, **options: Any) -> list[torch.Tensor]:
    working = WorkingCopy(mixed_model())
    working.load(pool, coefficients, **options)
    return weights_of(working.model)


def test_the_next_process_finds_the_model_and_its_bits(tmp_path: Path) -> None:
    assert load(copy(tmp_path))
    again = copy(tmp_path)
    assert not load(again)
    assert same_bytes(weights_of(again.model), expected())
    (file,) = tmp_path.iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


@pytest.mark.parametrize(
    "changes",
    [
        {"coefficients": COEFFICIENTS * 2},
        {"pool": SeedPool(22, 32)},
        {"family": "rademacher"},
    ],
)
def test_another_model_is_rebuilt_and_takes_the_place(tmp_path: Path, changes: dict[str, Any]) -> None:
    load(copy(tmp_path))
    other = copy(tmp_path)
    assert load(other, **changes)
    assert same_bytes(weights_of(other.model), expected(**changes))
    assert len(list(tmp_path.iterdir())) == 1
    assert load(copy(tmp_path))
    assert not load(copy(tmp_path))


def test_models_of_another_w0_have_files_of_their_own(tmp_path: Path) -> None:
    load(copy(tmp_path))
    other = mixed_model()
    with torch.no_grad():
        other[0].weight += 1
    assert load(copy(tmp_path, other))
    assert len(list(tmp_path.iterdir())) == 2
    assert not load(copy(tmp_path))


def test_other_tuned_parameters_of_the_same_w0_are_another_model(tmp_path: Path) -> None:
    def halves(frozen: int) -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
        model[frozen].requires_grad_(False)
        return model

    load(copy(tmp_path, halves(0)))
    found, wanted = copy(tmp_path, halves(1)), WorkingCopy(halves(1))
    assert load(found)
    wanted.load(POOL, COEFFICIENTS)
    assert same_bytes(weights_of(found.model), weights_of(wanted.model))


def test_what_others_left_is_removed_before_the_room_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The round before, and what a killed process began; not what another one is writing."""
    load(copy(tmp_path))
    (before,) = tmp_path.iterdir()
    killed = tmp_path / f".{before.name}.1-1.tmp"
    killed.mkdir()
    (killed / before.name).touch()
    elsewhere = tmp_path / ".other.1-1.tmp"
    elsewhere.mkdir()
    allocate, seen = os.posix_fallocate, []

    def looked(descriptor: int, start: int, size: int) -> None:
        seen.extend(path for path in (before, killed, writing) if path.exists())
        allocate(descriptor, start, size)

    monkeypatch.setattr(os, "posix_fallocate", looked)
    with folder_for_a_while(before) as writing:
        assert load(copy(tmp_path), COEFFICIENTS * 2)
        assert seen == [writing]
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".round", ".tmp"]
    assert elsewhere.exists()
    assert not load(copy(tmp_path), COEFFICIENTS * 2)


def test_a_part_of_a_file_or_another_one_is_no_model(tmp_path: Path) -> None:
    load(copy(tmp_path))
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    for damaged in (b"", whole[:-1], whole[: len(whole) // 2], whole + b"\0", bytes(len(whole))):
        file.write_bytes(damaged)
        working = copy(tmp_path)
        assert load(working)
        assert same_bytes(weights_of(working.model), expected())
        assert file.read_bytes() == whole
    # As after a crash of the machine: the name is there, and the end of the content is not.
    file.write_bytes(whole[:-64] + bytes(64))
    assert load(copy(tmp_path))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_bytes(whole)
    file.unlink()
    file.symlink_to(elsewhere)
    assert load(copy(tmp_path))
    assert not file.is_symlink()


def test_a_pipe_of_that_name_is_not_waited_for(tmp_path: Path) -> None:
    load(copy(tmp_path))
    (file,) = tmp_path.iterdir()
    file.unlink()
    os.mkfifo(file)
    working = copy(tmp_path)
    loading = threading.Thread(target=load, args=(working,), daemon=True)
    loading.start()
    loading.join(20)
    assert not loading.is_alive()
    assert same_bytes(weights_of(working.model), expected())


def test_a_file_that_cannot_be_mapped_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load(copy(tmp_path))

    def without_memory(*_: object) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr(np, "memmap", without_memory)
    working = copy(tmp_path)
    assert load(working)
    assert same_bytes(weights_of(working.model), expected())


@pytest.mark.parametrize("failing", ["posix_fallocate", "fsync", "replace"])
def test_without_room_it_is_rebuilt_and_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, failing: str
) -> None:
    """Nothing has the name of a model whose bytes may not be on the disk."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, failing, full)
    working = copy(tmp_path / "new")
    for scale in (1, 2):
        assert load(working, COEFFICIENTS * scale)
        assert same_bytes(weights_of(working.model), expected(COEFFICIENTS * scale))
    assert caplog.text.count("rebuilt for every message, as it cannot be kept in") == 1
    assert "No space left" in caplog.text
    assert list((tmp_path / "new").iterdir()) == []


def test_a_folder_that_cannot_be_made_is_no_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    working = copy(tmp_path / "file" / "below")
    assert load(working)
    assert same_bytes(weights_of(working.model), expected())
    assert "cannot be kept in" in caplog.text


def test_it_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = []
    for name in ("fsync", "replace"):
        call = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *given, name=name, call=call: (done.append(name), call(*given)))
    load(copy(tmp_path))
    assert done == ["fsync", "replace", "fsync"]  # the file, its name, the folder that has the name
    assert not load(copy(tmp_path))
