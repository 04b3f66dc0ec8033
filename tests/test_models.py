"""Model folders and hub ids: what loads, and what is refused with which words."""

from __future__ import annotations

import builtins
import json
import logging
import pickle
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support import tiny_language_model
from support.data_samples import make_tokenizer, save_model
from transformers import PreTrainedConfig

from fedkseed.data import models as data_models
from fedkseed.data.models import ModelError
from fedkseed.data.shapes import num_positions


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


def test_unknown_hub_id(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    hub = logging.getLogger("huggingface_hub.utils")

    def refuse(*_: Any, **options: Any) -> None:
        hub.warning("Retrying in 1s")
        assert not options["local_files_only"]
        raise OSError("owner/name is not a valid model identifier\nand more")

    monkeypatch.setattr(PreTrainedConfig, "get_config_dict", refuse)
    with pytest.raises(ModelError, match="owner/name: expected .* a hub id .* not a valid model identifier$"):
        data_models.load_causal_lm("owner/name")
    assert capsys.readouterr().err == "owner/name is no folder here: looking for it on the hub\n"
    hub.warning("said again")
    assert caplog.messages == ["said again"]


def save_as(folder: Path, model_class: Any, **options: Any) -> None:
    """A folder with a small model of this class, and the tokenizer that `save_model` gives."""
    sizes = {"vocab_size": 128, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    torch.manual_seed(0)
    config = model_class.config_class(**{**sizes, "num_attention_heads": 2, **options})
    model_class(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)


@pytest.mark.parametrize(
    ("load", "name"),
    [
        (data_models.load_causal_lm, "LlamaForCausalLM"),
        (data_models.load_causal_lm, "BertForMaskedLM"),
        (data_models.load_causal_lm, "BertLMHeadModel"),
        (data_models.load_classifier, "BertForSequenceClassification"),
        (data_models.load_any, "BertForSequenceClassification"),
        (data_models.load_any, "BertForMaskedLM"),
        (data_models.load_any, "LlamaForSequenceClassification"),
    ],
)
def test_the_class_is_the_one_that_the_config_names(tmp_path: Path, load: Any, name: str) -> None:
    model_class = getattr(transformers, name)
    save_as(tmp_path, model_class, **({"num_labels": 3} if "Sequence" in name else {}))
    model, _ = load(tmp_path, torch.bfloat16)
    assert type(model) is model_class
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    saved = model_class.from_pretrained(tmp_path, dtype=torch.bfloat16).state_dict()
    assert all(torch.equal(weight, saved[key]) for key, weight in model.state_dict().items())
    model.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["architectures"] == [name]


@pytest.mark.parametrize("architectures", [None, [], ["LlamaModel"], ["MyLlama"]])
def test_a_config_that_names_no_class_with_a_head_is_a_causal_model(
    tmp_path: Path, architectures: list[str] | None
) -> None:
    save_model(tmp_path)
    change(tmp_path / "config.json", architectures=architectures)
    assert type(data_models.load_causal_lm(tmp_path)[0]) is transformers.LlamaForCausalLM


def change(path: Path, **entries: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


@pytest.mark.parametrize(
    ("load", "name", "message"),
    [
        (
            data_models.load_causal_lm,
            "T5ForConditionalGeneration",
            r"expected a causal language model or a masked language model, got an encoder-decoder \(T5For",
        ),
        (
            data_models.load_causal_lm,
            "BertForSequenceClassification",
            r"got a sequence classifier \(BertForSequenceClassification\); name one of that kind",
        ),
        (
            data_models.load_causal_lm,
            "LlamaForTokenClassification",
            r"got a model of another kind \(LlamaForTokenClassification\)",
        ),
        (data_models.load_causal_lm, "ViTForImageClassification", r"got a model of another kind \(ViTFor"),
        (
            data_models.load_classifier,
            "LlamaForCausalLM",
            r"load a classifier from .* got a causal language model \(Llama.* or give this one a head",
        ),
        (
            data_models.load_classifier,
            "BertModel",
            r"got none for 2 \(classifier\.bias, classifier\.weight\); its head would be random numbers",
        ),
    ],
)
def test_a_model_of_another_kind_is_refused_in_words(
    tmp_path: Path, load: Any, name: str, message: str
) -> None:
    save_as(tmp_path, getattr(transformers, name))
    with pytest.raises(ModelError, match=message) as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)
    assert "to be whole" not in str(caught.value)


def test_weights_of_other_shapes(tmp_path: Path) -> None:
    save_model(tmp_path)
    change(tmp_path / "config.json", intermediate_size=24)
    message = (
        r"got \[16, 16\] in place of \[16, 24\] for model\.layers\.0\.mlp\.down_proj\.weight and 2 others"
    )
    with pytest.raises(ModelError, match=message):
        data_models.load_causal_lm(tmp_path)


def test_the_library_says_nothing_and_what_matters_is_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Its tables of missing and unexpected weights, and its bars where nobody watches, made many lines."""
    save_model(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["adapter.weight"] = torch.ones(2)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    level = transformers.utils.logging.get_verbosity()
    capfd.readouterr()
    data_models.load_causal_lm(tmp_path)
    (record,) = caplog.records
    assert "weights without a place in LlamaForCausalLM are left out: 1 (adapter.weight)" in record.message
    drop_a_weight(tmp_path)
    with pytest.raises(ModelError, match="got none for 1"):
        data_models.load_causal_lm(tmp_path)
    assert capfd.readouterr().err == ""
    assert transformers.utils.logging.get_verbosity() == level
    assert transformers.utils.logging.is_progress_bar_enabled()


def test_an_unknown_model_type(tmp_path: Path) -> None:
    save_model(tmp_path)
    change(tmp_path / "config.json", model_type="llama99")
    with pytest.raises(ModelError, match=r"expected a model type that transformers .* got 'llama99'"):
        data_models.load_causal_lm(tmp_path)


OWN_CODE = """
import pathlib
pathlib.Path({marker!r}).write_text("ran")
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""
AUTO_MAP = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}


class NeverRead:
    """A terminal that nobody may ask."""

    def readline(self, *_: Any) -> str:
        raise AssertionError("nobody is asked")

    read = readline

    def isatty(self) -> bool:
        return True


def own_code(folder: Path, *, kind: str) -> Path:
    """A folder whose code writes the file that is returned, as soon as it is imported."""
    save_model(folder)
    marker = folder / "ran"
    (folder / "own.py").write_text(OWN_CODE.format(marker=str(marker)))
    if kind == "tokenizer":
        auto_map = {"AutoTokenizer": [None, "own.OwnTokenizer"]}
        change(folder / "tokenizer_config.json", auto_map=auto_map, tokenizer_class="OwnTokenizer")
    else:
        change(
            folder / "config.json", auto_map=AUTO_MAP, **({"model_type": "own"} if kind == "model" else {})
        )
    return marker


@pytest.mark.parametrize("kind", ["model", "model of a known type", "tokenizer"])
@pytest.mark.parametrize(
    "load", [data_models.load_causal_lm, data_models.load_any, data_models.load_classifier]
)
def test_code_of_its_own_is_refused_and_nobody_is_asked(
    tmp_path: Path, kind: str, load: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = own_code(tmp_path, kind=kind)
    monkeypatch.setattr(sys, "stdin", NeverRead())
    monkeypatch.setattr(builtins, "input", NeverRead().readline)
    file = "tokenizer_config.json" if kind == "tokenizer" else "config.json"
    with pytest.raises(ModelError, match=rf"got code of its own \({file}: .*--trust-remote-code") as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)
    assert ("take auto_map out" in str(caught.value)) == (kind != "model")
    assert not marker.exists()


@pytest.mark.parametrize("kind", ["model", "tokenizer"])
def test_code_of_its_own_runs_if_it_is_trusted(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # transformers copies the code into a cache of modules, whose place it has read when it was imported.
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    folder = tmp_path / f"{kind}_folder"
    marker = own_code(folder, kind=kind)
    model, tokenizer = data_models.load_causal_lm(folder, trust_remote_code=True)
    assert marker.read_text() == "ran"
    assert type(model if kind == "model" else tokenizer).__name__ == f"Own{kind.title()}"


def test_a_pickle_in_the_place_of_weights_is_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.write_text, (tmp_path / "ran", "ran")

    save_model(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ModelError, match="expected the folder's files to be whole"):
        data_models.load_causal_lm(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("error", [EOFError(), TypeError("a\nb"), zlib.error("c"), AssertionError()])
def test_whatever_a_damaged_folder_raises_is_one_error(
    tmp_path: Path, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    save_model(tmp_path)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", fail)
    with pytest.raises(ModelError, match="expected the folder's files to be whole, got: ") as caught:
        data_models.load_causal_lm(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text", ["[]", "null", '"x"', "[" * 5000, '{"architectures": 5, "model_type": "llama"}']
)
def test_a_config_that_is_no_config(tmp_path: Path, text: str) -> None:
    save_model(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError) as caught:
        data_models.load_causal_lm(tmp_path)
    assert "\n" not in str(caught.value)


def add_pad(tokenizer: Any) -> None:
    tokenizer.add_special_tokens({"pad_token": "<pad>"})


def add_words(tokenizer: Any) -> None:
    tokenizer.add_tokens(["<pad>", "federated", "seeds"])


def add_image(tokenizer: Any) -> None:
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})


def write_image(tokenizer: Any) -> None:
    add_image(tokenizer)
    tokenizer.chat_template = "<image>" + tokenizer.chat_template


@torch.no_grad()
@pytest.mark.parametrize(("kind", "size", "wanted"), [("Bert", 12, 12), ("Roberta", 12, 10), ("GPT2", 9, 9)])
def test_positions_are_as_many_tokens_as_the_model_takes(kind: str, size: int, wanted: int) -> None:
    sizes: dict[str, int] = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 8}
    numbers = {**sizes, "intermediate_size": 8, "vocab_size": 40, "max_position_embeddings": size}
    config = getattr(transformers, f"{kind}Config")(**numbers)
    model = getattr(transformers, f"{kind}Model")(config).eval()
    assert num_positions(model) == wanted
    model(torch.full((1, wanted), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.full((1, wanted + 1), 5))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (add_pad, r"below 120, .* got 120 for the pad token '<pad>'; .* resize_token_embeddings\(121\)"),
        (add_words, r"got 120 for the token '<pad>' and 2 more up to 122; .* resize_token_embeddings\(123\)"),
        (write_image, r"got 120 for the token '<image>'"),
        (add_image, None),
        (lambda tokenizer: None, None),
    ],
)
def test_a_token_beyond_the_embeddings(
    tmp_path: Path, edit: Callable[[Any], Any], message: str | None
) -> None:
    """The tokenizer has 120 tokens, as many as the model."""
    tiny_language_model.make_model(torch.float32).save_pretrained(tmp_path)
    tokenizer = make_tokenizer()
    edit(tokenizer)
    tokenizer.save_pretrained(tmp_path)
    if message is None:
        data_models.load_causal_lm(tmp_path)
    else:
        with pytest.raises(ModelError, match=message) as caught:
            data_models.load_causal_lm(tmp_path)
        assert "\n" not in str(caught.value)
