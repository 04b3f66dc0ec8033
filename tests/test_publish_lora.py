"""Published LoRA ledgers: the adapter's start by a rule or stored, and a PeftModel back from the folder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from support.one_line import raised_line
from support.tiny_runs import write_llama

import fedkseed
import fedkseed_kernels
from fedkseed import FedKSeedSGD, IdentityError, Ledger, LedgerError, ModelIdentity, SeedPool, cli
from fedkseed.data.models import load_any_weights
from fedkseed.ledger import AdapterStart, Origin, OriginError, PublishedError, start_adapter
from fedkseed.ledger.adapter import CONFIG, NOTE, START, read_config, write_adapter
from fedkseed.ledger.adapter_start import base_dtype
from fedkseed.ledger.card import CARD, card_text
from fedkseed.ledger.format import LedgerSignatureError
from fedkseed.ledger.origin import FILE, Hashes
from fedkseed.ledger.published import LEDGER, Published, file_hashes
from fedkseed.ledger.signature import make_key_pair
from fedkseed.scenarios.publishing import publish

#: peft reads a property of transformers' models that has another name by now.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
TOKENS = torch.arange(12).reshape(2, 6)
USUAL: dict[str, Any] = {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    write_llama(tmp_path / "w0", num_layers=2)
    return tmp_path / "w0"


def adapted(
    base: Path, seed: int | None = 7, dtype: torch.dtype = torch.float32, **settings: Any
) -> tuple[PeftModel, AdapterStart]:
    """The base with an adapter at its start; by peft's own draw from a fixed seed where none is given."""
    torch.manual_seed(5)
    model = get_peft_model(load_any_weights(base, dtype), LoraConfig(**{**USUAL, **settings}))
    start = AdapterStart(None, base_dtype(model)) if seed is None else start_adapter(model, seed)
    return model.eval(), start


def trained(base: Path, folder: Path, *arguments: Any, **settings: Any) -> tuple[Path, str]:
    """A folder as a trainer leaves it, of three steps, and the content of what its ledger gives."""
    model, start = adapted(base, *arguments, **settings)
    w0, _ = adapted(base, *arguments, **settings)
    optimizer = FedKSeedSGD(model, lr=1e-2, eps=1e-2, seed_pool=SeedPool(3, 16))
    for _ in range(3):
        optimizer.step(lambda: model(TOKENS, labels=TOKENS).loss)
    folder.mkdir()
    ledger = optimizer.ledger(w0)
    ledger.save(folder / LEDGER)
    write_adapter(w0, start, folder)
    Origin.of(base, adapter=start).write(folder)
    ledger.apply_(w0)
    return folder, ModelIdentity.of(w0).content.hex()


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("seed", [7, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_folder_gives_the_tuned_adapter(
    seed: int | None, dtype: torch.dtype, base: Path, tmp_path: Path
) -> None:
    folder, content = trained(base, tmp_path / "trained", seed, dtype)
    written = publish(folder, tmp_path / "out", base=base)
    stored = {START} if seed is None else set()
    assert names(tmp_path / "out") == {CARD, FILE, LEDGER, CONFIG, *stored}
    state = torch.get_rng_state()
    tuned = fedkseed.load(tmp_path / "out", base)
    assert torch.equal(torch.get_rng_state(), state)
    assert isinstance(tuned, PeftModel)
    assert ModelIdentity.of(tuned).content.hex() == content
    w0, _ = adapted(base, seed, dtype)
    Ledger.load(folder / LEDGER).apply_(w0)
    assert torch.equal(tuned(TOKENS).logits, w0(TOKENS).logits)  # the scale of the adapter, too
    for model in (load_any_weights(base, dtype), adapted(base, seed, dtype)[0]):
        loaded = fedkseed.load(tmp_path / "out", model)
        assert ModelIdentity.of(loaded).content.hex() == content
    card = (tmp_path / "out" / CARD).read_text()
    assert ("random numbers that it began with" if seed is None else "made of seed 7 by a rule") in card
    assert "- lora\n" in card
    assert str(tmp_path).encode() not in b"".join(
        (tmp_path / "out" / name).read_bytes() for name in names(tmp_path / "out")
    )
    assert written.num_bytes < (60_000 if stored else 10_000)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": "all-linear"},
        {"target_modules": r".*\.1\..*\.(q|k)_proj"},
        {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"v_proj": 5.0}, "use_rslora": True},
        {"layers_to_transform": [1], "layers_pattern": "layers"},
        {"exclude_modules": ["model.layers.0.self_attn.q_proj"], "task_type": "CAUSAL_LM"},
        {"lora_dropout": 0.1, "init_lora_weights": "gaussian"},
    ],
)
def test_settings_that_say_what_the_model_computes_are_kept(
    settings: dict[str, Any], base: Path, tmp_path: Path
) -> None:
    folder, content = trained(base, tmp_path / "trained", **settings)
    publish(folder, tmp_path / "out", base=base)
    tuned = fedkseed.load(tmp_path / "out", base)
    assert ModelIdentity.of(tuned).content.hex() == content
    w0, _ = adapted(base, **settings)
    Ledger.load(folder / LEDGER).apply_(w0)
    assert torch.equal(tuned(TOKENS).logits, w0(TOKENS).logits)


def test_the_start_by_the_rule_is_the_noise_of_the_seed(base: Path) -> None:
    model, start = adapted(base, 9)
    assert start == AdapterStart(9, "float32")
    for stream, (name, weight) in enumerate(fedkseed.manifest_parameters(model)):
        if ".lora_A." in name:
            noise = fedkseed_kernels.normal(weight.shape, 9, stream=stream)
            assert torch.equal(weight, noise * weight.shape[1] ** -0.5)
        elif ".lora_B." in name:
            assert not weight.any()
    assert torch.equal(model(TOKENS).logits, load_any_weights(base)(TOKENS).logits)


def test_the_folder_is_asked_and_applied(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, content = trained(base, tmp_path / "trained", task_type="CAUSAL_LM")
    assert cli.main(["publish", str(folder), str(tmp_path / "out"), "--base", str(base)]) == 0
    named = ["--base", str(base)]
    assert cli.main(["ask", str(tmp_path / "out"), "abc", "--max-new-tokens", "3", *named]) == 0
    assert cli.main(["apply", str(tmp_path / "out"), "--out", str(tmp_path / "tuned"), *named]) == 0
    assert content in capsys.readouterr().out
    again = PeftModel.from_pretrained(load_any_weights(base), tmp_path / "tuned")
    tuned = fedkseed.load(tmp_path / "out", base)
    assert torch.equal(again.eval()(TOKENS).logits, tuned(TOKENS).logits)
    capsys.readouterr()
    assert cli.main(["inspect", str(tmp_path / "out")]) == 0
    assert "LoRA beside weights in float32, its start made of seed 7" in capsys.readouterr().out


@pytest.fixture
def out(base: Path, tmp_path: Path) -> Path:
    folder, _ = trained(base, tmp_path / "trained", None)
    publish(folder, tmp_path / "out", base=base)
    return tmp_path / "out"


def rewritten(folder: Path) -> None:
    """Hashes and card anew, as somebody would who changes a file on purpose."""
    origin = Origin.read(folder)
    assert origin.hashes is not None
    hashes = Hashes(origin.hashes.base, origin.hashes.tuned, file_hashes(folder))
    origin = Origin(**{**origin.__dict__, "hashes": hashes})
    origin.write(folder)
    (folder / CARD).write_text(card_text(origin, Ledger.load(folder / LEDGER)))


def test_a_changed_start_or_setting_is_refused(out: Path, base: Path) -> None:
    for name in (CONFIG, START):
        whole = (out / name).read_bytes()
        (out / name).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        raised_line(PublishedError, lambda: fedkseed.load(out, base))
        (out / name).unlink()
        raised_line(PublishedError, lambda: fedkseed.load(out, base))
        (out / name).write_bytes(whole)
    tensors = load_file(out / START)
    first = min(tensors)
    changed = [
        {**tensors, first: tensors[first] + 1},
        {**tensors, first: tensors[first].double()},
        {**tensors, first: tensors[first][:1].clone()},
        {name: tensor for name, tensor in tensors.items() if name != first},
        {**tensors, "model.embed_tokens.weight": torch.zeros(1)},
    ]
    for others in changed:
        save_file(others, out / START)
        rewritten(out)
        raised_line((IdentityError, OriginError), lambda: fedkseed.load(out, base))
    (out / START).write_bytes(b"x" * 100)
    rewritten(out)
    raised_line(OriginError, lambda: fedkseed.load(out, base))


def test_other_settings_are_refused_even_with_hashes_that_fit(out: Path, base: Path, tmp_path: Path) -> None:
    """The content of the parameters does not tell another scale: the ledger's note does, and is signed."""
    make_key_pair(tmp_path / "private.pem", tmp_path / "public.pem")
    publish(out, tmp_path / "signed", base=base, key=tmp_path / "private.pem")
    signed = tmp_path / "signed"
    fedkseed.load(signed, base, public_key=tmp_path / "public.pem")
    settings = json.loads((signed / CONFIG).read_text())
    (signed / CONFIG).write_text(json.dumps({**settings, "lora_alpha": 99}))
    rewritten(signed)
    assert CONFIG in raised_line(PublishedError, lambda: Published.read(signed))
    ledger = Ledger.load(signed / LEDGER)
    assert NOTE in ledger.notes
    notes = {name: text for name, text in ledger.notes.items() if name != NOTE}
    fields = {name: value for name, value in ledger.__dict__.items() if name != "notes"}
    Ledger(**fields, notes=notes).save(signed / LEDGER)
    rewritten(signed)
    with pytest.raises(LedgerSignatureError):
        fedkseed.load(signed, base, public_key=tmp_path / "public.pem")


@pytest.mark.parametrize(
    "hostile",
    [
        {"r": 0},
        {"r": 1 << 40},
        {"r": "4"},
        {"lora_alpha": float("inf")},
        {"target_modules": r"(a+)+$"},
        {"target_modules": [r"(a+)+$"]},
        {"rank_pattern": {r"(a+)+$": 2}},
        {"auto_mapping": {"base_model_class": "x", "parent_library": "os"}},
        {"base_model_name_or_path": "../elsewhere"},
        {"modules_to_save": ["lm_head"]},
        {"init_lora_weights": "pissa"},
        {"peft_type": "IA3"},
        {"task_type": "exec()"},
        {"runtime_config": {}},
        {"unknown": 1},
        {"lora_dropout": 1.5},
    ],
)
def test_hostile_settings_are_one_line(hostile: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / CONFIG).parent.mkdir()
    (tmp_path / CONFIG).write_text(json.dumps({"peft_type": "LORA", **USUAL, **hostile}))
    raised_line(OriginError, lambda: read_config(tmp_path))


def test_settings_of_another_shape_take_no_memory(out: Path, base: Path) -> None:
    """A rank of two thousand million, beside a ledger of a small model: refused before it is made."""
    settings = json.loads((out / CONFIG).read_text())
    for other in ({"r": 2**31 - 1}, {"target_modules": ["k_proj"]}, {"target_modules": ["nothing"]}):
        (out / CONFIG).write_text(json.dumps({**settings, **other}))
        origin = Origin.read(out)
        ledger = Ledger.load(out / LEDGER)
        published = Published(out, "it", ledger, origin, None)
        raised_line((IdentityError, OriginError), lambda published=published: published.load(base))  # type: ignore[misc]


@pytest.mark.parametrize(
    "settings",
    [
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"bias": "lora_only"},
        {"lora_bias": True},
        {"trainable_token_indices": [1]},
    ],
)
def test_an_adapter_that_cannot_be_published_is_one_line(
    settings: dict[str, Any], base: Path, tmp_path: Path
) -> None:
    model, start = adapted(base, None, **settings)
    assert next(iter(settings)) in raised_line(OriginError, lambda: write_adapter(model, start, tmp_path))


def test_what_the_rule_does_not_make_is_refused_and_left_alone(base: Path, tmp_path: Path) -> None:
    raised_line(OriginError, lambda: start_adapter(load_any_weights(base), 1))
    raised_line(OriginError, lambda: write_adapter(load_any_weights(base), AdapterStart(1), tmp_path))
    model, _ = adapted(base, None, target_modules=["q_proj", "embed_tokens"])
    before = ModelIdentity.of(model)
    raised_line(OriginError, lambda: start_adapter(model, 1))
    assert ModelIdentity.of(model) == before
    other, _ = adapted(base)
    other.add_adapter("second", LoraConfig(**USUAL))
    raised_line(OriginError, lambda: write_adapter(other, AdapterStart(), tmp_path))
    assert not (tmp_path / CONFIG).exists()


def test_an_adapter_beside_an_embedding_has_its_start_stored(base: Path, tmp_path: Path) -> None:
    folder, content = trained(base, tmp_path / "trained", None, target_modules=["q_proj", "embed_tokens"])
    publish(folder, tmp_path / "out", base=base)
    assert ModelIdentity.of(fedkseed.load(tmp_path / "out", base)).content.hex() == content


def test_a_folder_that_lacks_the_adapter_is_one_line(base: Path, tmp_path: Path) -> None:
    folder, _ = trained(base, tmp_path / "trained", None)
    for name in (START, CONFIG):
        (folder / name).unlink()
        assert name in raised_line(LedgerError, lambda: publish(folder, tmp_path / "out", base=base))
    assert {path.name for path in tmp_path.iterdir()} == {"w0", "trained"}


@pytest.fixture(autouse=True)
def _generators() -> Iterator[None]:
    state = torch.get_rng_state()
    yield
    torch.set_rng_state(state)
