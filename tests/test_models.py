"""Model folders and hub ids: what loads, and what is refused with which words."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.data_samples import save_model

from fedkseed.data import models as data_models
from fedkseed.data.models import ModelError


def test_load_local_folder(tmp_path: Path) -> None:
    save_model(tmp_path)
    for name in (tmp_path, str(tmp_path)):
        model, tokenizer = data_models.load_causal_lm(name, torch.float16)
        assert model.dtype == torch.float16
        assert not model.training
        assert tokenizer.eos_token == "</s>"


def remove(*names: str) -> Callable[[Path], None]:
    return lambda folder: [(folder / name).unlink() for name in names] and None


def truncate(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])


def drop_a_weight(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove("config.json"), r"is not a model folder: missing config\.json; it holds"),
        (remove("model.safetensors"), r"missing weights \(model\.safetensors or "),
        (remove("config.json", "model.safetensors"), r"missing config\.json; missing weights"),
        (remove("tokenizer.json", "tokenizer_config.json"), "missing a tokenizer"),
        (lambda folder: (folder / "config.json").write_text("{"), "expected the folder's files to be whole"),
        (truncate, "expected the folder's files to be whole"),
        (drop_a_weight, r"expected weights for every parameter, got none for 1 \(model\.norm\.weight\)"),
    ],
)
def test_folder_that_is_no_model(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    save_model(tmp_path)
    damage(tmp_path)
    with pytest.raises(ModelError, match=message):
        data_models.load_causal_lm(tmp_path)


def test_paths_that_are_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="got nothing there"):
        data_models.load_causal_lm(str(tmp_path / "absent"))
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match="got a file"):
        data_models.load_causal_lm(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="it holds nothing"):
        data_models.load_causal_lm(tmp_path / "empty")
    with pytest.raises(ModelError, match="floating-point dtype"):
        data_models.load_causal_lm(tmp_path, torch.int64)


def test_local_or_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert all(map(data_models.is_local, ["here", "./x", "../x", "/x", "~/x", "a/b/c", Path("x")]))
    assert not any(map(data_models.is_local, ["owner/name", "gpt2"]))


def test_unknown_hub_id(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM

    def refuse(*_: Any, **options: Any) -> None:
        assert not options["local_files_only"]
        raise OSError("owner/name is not a valid model identifier\nand more")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)
    with pytest.raises(ModelError, match="owner/name: expected .* a hub id .* not a valid model identifier$"):
        data_models.load_causal_lm("owner/name")
