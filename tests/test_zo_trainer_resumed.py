"""Runs of the zeroth-order Trainer that go on from a checkpoint: the bits of the undisturbed run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from support.small_model import largest_difference, weights_of
from support.tiny_trainer import Rows, digest_of, losses_of, make_llama, make_trainer, stir
from torch import nn

from fedkseed import Inplace, Ledger, SeedPool, Streamed
from fedkseed.adapters.transformers import ZOTrainer
from fedkseed.simulation.run_folder import LEDGER

peft = pytest.importorskip("peft", reason="needs the extra scenarios")

POOL = SeedPool(base_seed=5, num_seeds=64)
#: peft asks transformers by a name that goes away.
of_peft = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
#: Of a checkpoint at the sixth of twelve steps, amid an epoch.
SAVED = {"save_strategy": "steps", "save_steps": 6}


def adapted() -> nn.Module:
    """The model with adapters that are not zero, the same each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        return peft.get_peft_model(make_llama(), config)


class Case(NamedTuple):
    """A kind of run."""

    options: Mapping[str, Any] = MappingProxyType({})
    arguments: Mapping[str, Any] = MappingProxyType({})
    make: Callable[[], nn.Module] = make_llama


ACCUMULATED = {"gradient_accumulation_steps": 2}
COSINE = {"lr_scheduler_type": "cosine", "warmup_steps": 3}
CASES = {
    "fp32 in place": Case(),
    "bf16": Case(make=lambda: make_llama(torch.bfloat16)),
    "chained": Case({"storage": Inplace(chained=True)}),
    "streamed": Case({"storage": Streamed()}),
    "paired": Case({"storage": Streamed(paired=True)}),
    "accumulation": Case(arguments=ACCUMULATED),
    "adapters": Case(make=adapted),
    "pool": Case({"seed_pool": POOL}),
    "decay": Case(arguments={"weight_decay": 0.5}),
    "cosine schedule with warm-up": Case(arguments=COSINE),
    "dropout": Case({"train_mode": True}, make=lambda: make_llama(dropout=0.5)),
    "directions": Case({"num_directions": 3}),
    "pool, chained": Case({"seed_pool": POOL, "storage": Inplace(chained=True)}),
    "pool, bf16": Case({"seed_pool": POOL}, make=lambda: make_llama(torch.bfloat16)),
    "pool, adapters, cosine schedule": Case({"seed_pool": POOL}, COSINE, adapted),
    "chained, accumulation, decay": Case(
        {"storage": Inplace(chained=True)}, {**ACCUMULATED, "weight_decay": 0.5}
    ),
    "bf16, accumulation, cosine schedule, decay": Case(
        arguments={**ACCUMULATED, **COSINE, "weight_decay": 0.5}, make=lambda: make_llama(torch.bfloat16)
    ),
    "accumulation, dropout": Case({"train_mode": True}, ACCUMULATED, lambda: make_llama(dropout=0.5)),
    "workers": Case(arguments={"dataloader_num_workers": 1}),
}
#: Those of one kind each; the others join several.
_FAST = 11


def trained(case: Case, folder: Path, checkpoint: Path | bool | None = None, **arguments: Any) -> ZOTrainer:
    trainer = make_trainer(
        folder,
        case.make(),
        {**SAVED, **case.arguments, **arguments},
        train_dataset=Rows(18),
        **case.options,
    )
    trainer.train(str(checkpoint) if isinstance(checkpoint, Path) else checkpoint)
    return trainer


@of_peft
@pytest.mark.filterwarnings("ignore:the model is in train mode with dropout:UserWarning")
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=name, marks=[] if place < _FAST else pytest.mark.slow)
        for place, (name, case) in enumerate(CASES.items())
    ],
)
def test_a_resumed_run_ends_with_the_bits_of_the_undisturbed_one(case: Case, tmp_path: Path) -> None:
    stir(11)
    whole = trained(case, tmp_path / "whole")
    stir(12345)
    resumed = trained(case, tmp_path / "resumed", tmp_path / "whole" / "checkpoint-6")
    assert digest_of(whole.model) == digest_of(resumed.model) != digest_of(case.make())
    assert losses_of(whole) == losses_of(resumed)
    assert len(losses_of(whole)) == 12
    ledgers = [tmp_path / name / "checkpoint-12" / LEDGER for name in ("whole", "resumed")]
    assert [ledger.exists() for ledger in ledgers] == 2 * ["seed_pool" in case.options]
    if "seed_pool" in case.options:
        assert ledgers[0].read_bytes() == ledgers[1].read_bytes()
        assert Ledger.load(ledgers[0]).identity.content == digest_of(case.make())


@of_peft
def test_of_a_model_with_adapters_those_alone_are_tuned(tmp_path: Path) -> None:
    before, trainer = adapted(), trained(CASES["adapters"], tmp_path, save_strategy="no")
    for (name, old), new in zip(before.named_parameters(), trainer.model.parameters(), strict=True):
        assert torch.equal(old, new) is ("lora" not in name), name


@pytest.mark.slow
def test_the_last_checkpoint_of_the_folder_is_found(tmp_path: Path) -> None:
    whole = trained(CASES["pool"], tmp_path / "whole")
    trained(CASES["pool"], tmp_path / "parts", max_steps=6)
    resumed = trained(CASES["pool"], tmp_path / "parts", checkpoint=True)
    assert digest_of(whole.model) == digest_of(resumed.model)
    assert resumed.zeroth_order.history == whole.zeroth_order.history  # type: ignore[attr-defined]


@pytest.mark.slow
def test_a_trainer_that_has_trained_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    """Its optimizer, and the ledger, are those of the checkpoint, whatever it walked along before."""
    trainer = trained(CASES["pool"], tmp_path)
    end, ledger = digest_of(trainer.model), (tmp_path / "checkpoint-12" / LEDGER).read_bytes()
    trainer.train(str(tmp_path / "checkpoint-6"))
    assert digest_of(trainer.model) == end
    assert (tmp_path / "checkpoint-12" / LEDGER).read_bytes() == ledger


@pytest.mark.slow
def test_a_second_call_of_train_goes_on_along_new_seeds(tmp_path: Path) -> None:
    trainer = trained(CASES["pool"], tmp_path)
    trainer.train()
    trainer.save_model()
    assert len(trainer.zeroth_order.history) == 24  # type: ignore[attr-defined]
    ledger = Ledger.load(tmp_path / LEDGER)
    assert ledger.identity.content == digest_of(make_llama())
    rebuilt = make_llama()
    ledger.apply_(rebuilt)
    assert largest_difference(weights_of(rebuilt), weights_of(trainer.model)) < 1e-5
    assert largest_difference(weights_of(make_llama()), weights_of(trainer.model)) > 1e-2
