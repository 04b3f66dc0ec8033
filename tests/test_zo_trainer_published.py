"""A Trainer's run along a pool of seeds, published, and loaded from the folder again."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from support.tiny_runs import write_llama
from support.tiny_trainer import Rows, make_arguments

import fedkseed
from fedkseed import Ledger, ModelIdentity, SeedPool
from fedkseed.adapters.transformers import ZOTrainer
from fedkseed.adapters.transformers.peft_start import start_of
from fedkseed.data.models import load_any_weights
from fedkseed.ledger import start_adapter
from fedkseed.ledger.adapter import START
from fedkseed.ledger.origin import FILE, Origin
from fedkseed.ledger.published import LEDGER
from fedkseed.scenarios.publishing import publish

#: peft reads a property of transformers' models that has another name by now.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
POOL = SeedPool(3, 16)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    write_llama(tmp_path / "w0", num_layers=2)
    return tmp_path / "w0"


def adapted(base: Path, config: Any = None) -> Any:
    torch.manual_seed(5)
    return get_peft_model(load_any_weights(base, torch.float32), config or LoraConfig(r=2))


def trained(model: Any, folder: Path, num_steps: int = 4, **arguments: Any) -> ZOTrainer:
    args = make_arguments(folder, max_steps=num_steps, save_steps=2, save_strategy="steps", **arguments)
    trainer = ZOTrainer(model, args, train_dataset=Rows(), seed_pool=POOL, eps=1e-2)
    trainer.train()
    trainer.save_model()
    return trainer


def test_all_weights(base: Path, tmp_path: Path) -> None:
    trainer = trained(load_any_weights(base, torch.float32), tmp_path / "run")
    written = publish(tmp_path / "run", tmp_path / "out", base=base)
    model = fedkseed.load(tmp_path / "out", base)
    hashes = written.published.origin.hashes
    assert hashes is not None
    assert ModelIdentity.of(model).content.hex() == hashes.tuned
    for walked, rebuilt in zip(trainer.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(walked, rebuilt, rtol=0, atol=1e-6)
    facts = Origin.read(tmp_path / "out").facts
    assert (facts["num_steps"], facts["batch_size"], facts["eps"]) == (4, 2, 1e-2)
    assert str(tmp_path) not in (tmp_path / "out" / FILE).read_text()


@pytest.mark.parametrize("by_rule", [True, False])
def test_adapters_of_peft(base: Path, tmp_path: Path, by_rule: bool) -> None:
    """Adapters by the rule of the pool's seed need no numbers stored; others do."""
    model = adapted(base)
    if by_rule:
        start_adapter(model, POOL.base_seed)
    before = {name: weight.clone() for name, weight in model.named_parameters() if "lora_A" in name}
    trainer = trained(model, tmp_path / "run", num_steps=2)
    assert (tmp_path / "run" / START).exists() != by_rule
    publish(tmp_path / "run", tmp_path / "out", base=base)
    loaded = fedkseed.load(tmp_path / "out", base)
    walked = dict(trainer.model.named_parameters())
    for name, weight in loaded.named_parameters():
        torch.testing.assert_close(weight, walked[name], rtol=0, atol=1e-6)
    assert all(not torch.equal(walked[name], weight) for name, weight in before.items())


def test_looking_for_the_rule_leaves_an_adapter_that_began_otherwise_as_it_was(base: Path) -> None:
    model, twin = adapted(base), adapted(base)
    assert start_of(model, POOL.base_seed).seed is None
    assert ModelIdentity.of(model).content == ModelIdentity.of(twin).content
    start_adapter(twin, POOL.base_seed)
    by_rule = ModelIdentity.of(twin).content
    assert start_of(twin, POOL.base_seed).seed == POOL.base_seed
    assert ModelIdentity.of(twin).content == by_rule != ModelIdentity.of(model).content


@pytest.mark.slow
def test_a_resumed_run_keeps_what_it_began_with(base: Path, tmp_path: Path) -> None:
    trained(adapted(base), tmp_path / "whole")
    trained(adapted(base), tmp_path / "run", num_steps=2)
    later = adapted(base)
    with torch.no_grad():
        for name, weight in later.named_parameters():
            if "lora_" in name:
                weight.add_(1)  # its own start does not matter any more
    args = make_arguments(tmp_path / "run", max_steps=4, save_strategy="no")
    trainer = ZOTrainer(later, args, train_dataset=Rows(), seed_pool=POOL, eps=1e-2)
    trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    trainer.save_model()
    for name in (LEDGER, START):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_what_no_card_can_tell_is_said_and_the_run_goes_on(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "fedkseed"):
        trained(adapted(base, IA3Config(feedforward_modules=[])), tmp_path / "run", num_steps=1)
    assert f"no {FILE} is written beside the ledger" in caplog.text
    assert len(Ledger.load(tmp_path / "run" / LEDGER).coefficients) == POOL.num_seeds
    assert not (tmp_path / "run" / FILE).exists()
