"""The folder of a tuned model, made from a ledger and a base's folder: whole, or not there."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from support.data_samples import make_tokenizer, save_model
from transformers import AutoTokenizer, BertConfig, LlamaForCausalLM

import fedkseed
from fedkseed import IdentityError, Ledger, LedgerError, ModelIdentity, SeedPool, cli
from fedkseed._extras import MissingExtraError
from fedkseed.data import ModelError, load_causal_lm, load_causal_lm_weights
from fedkseed.data.models import smollm2_folder
from fedkseed.files import FolderNotEmptyError
from fedkseed.ledger.format import LedgerDamagedError, LedgerUnsignedError
from fedkseed.ledger.signature import make_key_pair
from fedkseed.ledger.tuned_model import write_tuned_model


@pytest.fixture
def base(tmp_path: Path) -> Path:
    save_model(tmp_path / "base")
    return tmp_path / "base"


def make_ledger(base: Path, dtype: torch.dtype = torch.float32, num_seeds: int = 8) -> Ledger:
    coefficients = np.zeros(num_seeds)
    coefficients[[1, 5, -1]] = [1e-2, -2e-2, 3e-3]
    return Ledger.of(load_causal_lm_weights(base, dtype), SeedPool(6, num_seeds), coefficients)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_folder_is_the_tuned_model(tmp_path: Path, base: Path, dtype: torch.dtype) -> None:
    ledger = make_ledger(base, dtype)
    ledger.save(tmp_path / "ledger")
    identity = write_tuned_model(tmp_path / "ledger", str(base), tmp_path / "tuned")
    in_memory = fedkseed.load(ledger, base)
    assert isinstance(in_memory, LlamaForCausalLM)
    assert in_memory.dtype == dtype
    assert ModelIdentity.of(in_memory) == identity
    # As transformers loads it when nobody names a dtype.
    reloaded = LlamaForCausalLM.from_pretrained(tmp_path / "tuned")
    assert ModelIdentity.of(reloaded) == identity
    assert identity.content != ledger.identity.content
    assert names(tmp_path / "tuned") == names(base)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tuned")
    assert tokenizer("a line\n").input_ids == make_tokenizer()("a line\n").input_ids
    assert tokenizer.chat_template == make_tokenizer().chat_template
    assert load_causal_lm(tmp_path / "tuned")[0].config.tie_word_embeddings
    assert names(tmp_path) == {"base", "ledger", "tuned"}


@pytest.mark.parametrize("name", ["BertForMaskedLM", "BertForSequenceClassification", "BertLMHeadModel"])
def test_the_folder_has_the_class_of_the_base(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Head included: apply wrote BertLMHeadModel for each of them, and a classifier's head was refused."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=128, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    model_class = getattr(transformers, name)
    model_class(config).save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    w0 = model_class.from_pretrained(tmp_path / "base")
    ledger = Ledger.of(w0, SeedPool(6, 8), np.full(8, 0.1))
    ledger.save(tmp_path / "ledger")
    arguments = ["--base", str(tmp_path / "base"), "--out", str(tmp_path / "tuned")]
    assert cli.main(["apply", str(tmp_path / "ledger"), *arguments]) == 0
    ledger.apply_(w0)
    tuned = model_class.from_pretrained(tmp_path / "tuned")
    assert ModelIdentity.of(tuned) == ModelIdentity.of(w0)
    assert tuned.config.architectures == [name]
    assert ModelIdentity.of(w0).content.hex() in capsys.readouterr().out


def test_a_base_with_code_of_its_own(tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_ledger(base).save(tmp_path / "ledger")
    config = json.loads((base / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "own.OwnModel"}
    (base / "config.json").write_text(json.dumps(config))
    marker = tmp_path / "ran"
    (base / "own.py").write_text(
        f"import pathlib\npathlib.Path({str(marker)!r}).write_text('ran')\n"
        "from transformers import LlamaForCausalLM\nclass OwnModel(LlamaForCausalLM):\n    pass\n"
    )
    capsys.readouterr()
    arguments = ["--base", str(base), "--out", str(tmp_path / "tuned")]
    assert cli.main(["apply", str(tmp_path / "ledger"), *arguments]) == 2
    assert cli.main(["ask", str(base), "a"]) == 2
    for line in capsys.readouterr().err.splitlines():
        assert "got code of its own" in line
        assert "--trust-remote-code" in line
    assert names(tmp_path) == {"base", "ledger"}
    assert cli.main(["ask", str(base), "a", "--trust-remote-code"]) == 0
    assert marker.exists()


def test_frozen_parameters_stay(tmp_path: Path, base: Path) -> None:
    w0 = load_causal_lm_weights(base)
    w0.get_input_embeddings().requires_grad_(False)
    write_tuned_model(Ledger.of(w0, SeedPool(6, 8), np.full(8, 0.1)), base, tmp_path / "tuned")
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "tuned"))
    unchanged = {name for name in before if torch.equal(before[name], after[name])}
    assert unchanged == {"model.embed_tokens.weight"}
    assert before.keys() == after.keys()


def test_the_base_needs_a_tokenizer_only_for_a_folder(tmp_path: Path, base: Path) -> None:
    ledger = make_ledger(base)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (base / name).unlink()
    fedkseed.load(ledger, base)
    with pytest.raises(ModelError, match="missing a tokenizer"):
        write_tuned_model(ledger, base, tmp_path / "tuned")
    assert names(tmp_path) == {"base"}


def test_refusals_leave_nothing(tmp_path: Path, base: Path) -> None:
    ledger = make_ledger(base)
    other = tmp_path / "other"
    model, tokenizer = load_causal_lm(base)
    with torch.no_grad():
        model.get_input_embeddings().weight[3, 4] += 1
    model.save_pretrained(other)
    tokenizer.save_pretrained(other)
    data = ledger.to_bytes()
    (tmp_path / "damaged").write_bytes(data[:-1])
    somebody = make_key_pair(tmp_path / "private.pem", tmp_path / "public.pem")
    mixed = Ledger(1, np.ones(2), ModelIdentity(bytes(32), bytes(32), "mixed"))
    before = names(tmp_path)
    target = tmp_path / "tuned"
    with pytest.raises(IdentityError, match="the same shapes, other numbers"):
        write_tuned_model(ledger, other, target)
    with pytest.raises(IdentityError, match="expected weights of content"):
        fedkseed.load(ledger, other)
    with pytest.raises(LedgerDamagedError):
        write_tuned_model(tmp_path / "damaged", base, target)
    with pytest.raises(LedgerUnsignedError):
        write_tuned_model(ledger, base, target, public_key=somebody)
    with pytest.raises(LedgerError, match="got mixed; load the base yourself"):
        write_tuned_model(mixed, base, target)
    with pytest.raises(LedgerError, match="got mixed; load the base yourself"):
        fedkseed.load(mixed, base)
    with pytest.raises(ModelError, match="got nothing there"):
        write_tuned_model(ledger, tmp_path / "absent", target)
    with pytest.raises(FileNotFoundError):
        write_tuned_model(ledger, base, tmp_path / "absent" / "tuned")
    with pytest.raises(FolderNotEmptyError, match="expected a new or an empty folder, got .*base"):
        write_tuned_model(ledger, base, base)
    assert names(tmp_path) == before


def test_a_failure_in_mid_save_leaves_nothing(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = make_ledger(base)

    def fail(self: LlamaForCausalLM, folder: Path) -> None:
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", fail)
    with pytest.raises(OSError, match="No space left"):
        write_tuned_model(ledger, base, tmp_path / "tuned")
    assert names(tmp_path) == {"base"}


def test_without_transformers(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = make_ledger(base)
    model = load_causal_lm_weights(base)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "transformers" else find_spec(name)
    )
    with pytest.raises(MissingExtraError, match=r"expected the package transformers, .*kernels\[hf\]"):
        fedkseed.load(ledger, base)
    fedkseed.load(ledger, model)


@pytest.mark.slow
@pytest.mark.model
def test_smollm2(tmp_path: Path) -> None:
    """K = 4096 with three coefficients that are not zero: rebuilt, written, and refused on another base."""
    ledger = make_ledger(smollm2_folder(), torch.bfloat16, num_seeds=4096)
    ledger.save(tmp_path / "ledger")
    assert (tmp_path / "ledger").stat().st_size <= 17_500
    tuned = fedkseed.load(tmp_path / "ledger", smollm2_folder())
    identity = write_tuned_model(tmp_path / "ledger", smollm2_folder(), tmp_path / "tuned")
    assert ModelIdentity.of(tuned) == identity
    assert ModelIdentity.of(load_causal_lm_weights(tmp_path / "tuned", torch.bfloat16)) == identity
    model = load_causal_lm_weights(smollm2_folder(), torch.bfloat16)
    weight = model.get_parameter("model.layers.17.mlp.up_proj.weight")
    weight.data.view(torch.int16)[5, 7] ^= 1
    before = ModelIdentity.of(model)
    with pytest.raises(IdentityError, match="the same shapes, other numbers"):
        ledger.apply_(model)
    assert ModelIdentity.of(model) == before
    with pytest.raises(IdentityError, match="expected weights in bfloat16, got float32"):
        ledger.apply_(load_causal_lm_weights(smollm2_folder(), torch.float32))
