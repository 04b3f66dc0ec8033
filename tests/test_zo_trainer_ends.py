"""Ends of a zeroth-order Trainer's run: the best weights, an early stop, an interrupt, memory that is out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.small_model import largest_difference, weights_of
from support.tiny_trainer import Rows, digest_of, losses_of, make_llama, make_trainer
from transformers import EarlyStoppingCallback, LlamaForCausalLM, TrainerCallback

from fedkseed import Inplace, Ledger, SeedPool, Streamed
from fedkseed.simulation.run_folder import LEDGER
from fedkseed.storage import StorageOptions

POOL = SeedPool(base_seed=5, num_seeds=64)
STORAGES: dict[str, StorageOptions] = {
    "in place": Inplace(),
    "chained": Inplace(chained=True),
    "streamed": Streamed(),
}
all_storages = pytest.mark.parametrize("storage", STORAGES.values(), ids=STORAGES)
#: Evaluates and saves every second step, and ends with the best weights.
BEST: dict[str, Any] = {
    "eval_strategy": "steps",
    "eval_steps": 2,
    "save_strategy": "steps",
    "save_steps": 2,
    "load_best_model_at_end": True,
    "learning_rate": 1e-2,
}


def evaluated(folder: Path, **options: Any) -> Any:
    """A Trainer of such a run; its steps are large enough that the end is not the best."""
    arguments = {**BEST, **options.pop("arguments", {})}
    return make_trainer(folder, None, arguments, eval_dataset=Rows(8, seed=8), **options)


@all_storages
@pytest.mark.parametrize("seed_pool", [None, POOL], ids=["new seeds", "pool"])
@pytest.mark.few(3)
def test_a_run_ends_with_the_best_weights_and_their_ledger(
    storage: StorageOptions, seed_pool: SeedPool | None, tmp_path: Path
) -> None:
    trainer = evaluated(tmp_path, storage=storage, seed_pool=seed_pool)
    trainer.train()
    losses = {
        entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry
    }
    best = min(losses, key=losses.__getitem__)
    assert sorted(losses) == [2, 4, 6, 8, 10, 12]
    assert best < 12
    checkpoint = tmp_path / f"checkpoint-{best}"
    assert Path(trainer.state.best_model_checkpoint) == checkpoint
    kept = LlamaForCausalLM.from_pretrained(checkpoint)
    assert digest_of(trainer.model) == digest_of(kept)
    assert trainer.evaluate()["eval_loss"] == losses[best]
    trainer.save_model()
    assert (tmp_path / LEDGER).exists() is (seed_pool is not None)
    if seed_pool is not None:
        assert (tmp_path / LEDGER).read_bytes() == (checkpoint / LEDGER).read_bytes()
        rebuilt = make_llama()
        Ledger.load(tmp_path / LEDGER).apply_(rebuilt)
        assert largest_difference(weights_of(rebuilt), weights_of(kept)) < 1e-5
        assert largest_difference(weights_of(make_llama()), weights_of(kept)) > 1e-3
        with pytest.raises(ValueError, match="ended with its best weights: its ledger goes on after them"):
            trainer.train()
        trainer.train(str(checkpoint))
        assert trainer.state.global_step == 12


def test_evaluation_does_not_change_the_run(tmp_path: Path) -> None:
    evaluating = evaluated(tmp_path, arguments={"load_best_model_at_end": False})
    alone = make_trainer(tmp_path, arguments={"learning_rate": BEST["learning_rate"]})
    for trainer in (evaluating, alone):
        trainer.train()
    assert losses_of(evaluating) == losses_of(alone)
    assert digest_of(evaluating.model) == digest_of(alone.model)


def test_a_run_stops_early_where_evaluation_gets_no_better(tmp_path: Path) -> None:
    stops = EarlyStoppingCallback(early_stopping_patience=1)
    trainer = evaluated(tmp_path, callbacks=[stops], arguments={"max_steps": 40, "num_train_epochs": 9})
    trainer.train()
    assert 2 < trainer.state.global_step < 40
    best = trainer.state.best_model_checkpoint
    assert best.endswith(f"-{trainer.state.global_step - 2}")
    assert digest_of(trainer.model) == digest_of(LlamaForCausalLM.from_pretrained(best))


class Interrupts(TrainerCallback):  # type: ignore[misc]
    """Raises, or ends the run, at an event of the fourth step, once."""

    def __init__(self, event: str, stops: bool) -> None:
        self._is_over = False
        setattr(self, event, self._interrupt)
        self._stops = stops

    def _interrupt(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if state.global_step == 3 and not self._is_over:
            self._is_over = True
            if not self._stops:
                raise KeyboardInterrupt
            control.should_training_stop = True
        return control


@pytest.mark.slow
@all_storages
@pytest.mark.parametrize("event", ["on_step_begin", "on_substep_end", "on_pre_optimizer_step"])
def test_an_interrupt_by_a_callback_leaves_the_weights_of_the_step_before(
    event: str, storage: StorageOptions, tmp_path: Path
) -> None:
    _check_interrupted(event, False, storage, tmp_path)


@pytest.mark.slow
@all_storages
def test_a_stop_between_the_batches_of_a_step_does_too(storage: StorageOptions, tmp_path: Path) -> None:
    _check_interrupted("on_substep_end", True, storage, tmp_path)


def _check_interrupted(event: str, stops: bool, storage: StorageOptions, folder: Path) -> None:
    """The weights are those after three steps; a further run begins with a step of its own batches alone."""
    arguments = {"gradient_accumulation_steps": 2, "max_steps": 6}
    trainer = make_trainer(folder, None, arguments, storage=storage, callbacks=[Interrupts(event, stops)])
    if stops:
        trainer.train()
    else:
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
    twin = make_trainer(folder, None, {**arguments, "max_steps": 3}, storage=storage)
    twin.train()
    assert largest_difference(weights_of(trainer.model), weights_of(twin.model)) < 1e-6
    if isinstance(storage, Streamed):
        assert digest_of(trainer.model) == digest_of(twin.model)
    for again in (trainer, twin):
        again.train()
    assert losses_of(trainer)[:3] == pytest.approx(losses_of(twin)[:3], rel=1e-5)


class Fails(LlamaForCausalLM):
    """A model whose forward raises, of so many rows or at so many calls; never, unless told."""

    error: BaseException
    at_rows: int | None = None
    at_call: int | None = None
    num_calls = 0

    def forward(
        self, input_ids: torch.Tensor, attention_mask: Any = None, labels: Any = None, **kwargs: Any
    ) -> Any:
        self.num_calls += 1
        if self.num_calls == self.at_call or len(input_ids) == self.at_rows:
            raise self.error
        return super().forward(input_ids, attention_mask, labels=labels, **kwargs)


@all_storages
@pytest.mark.parametrize("call", [7, 8])
@pytest.mark.few(3)
def test_an_interrupt_in_a_forward_pass_leaves_them_as_well(
    call: int, storage: StorageOptions, tmp_path: Path
) -> None:
    """An interrupt of either side of the fourth step."""
    model = make_llama(kind=Fails)
    model.error, model.at_call = KeyboardInterrupt(), call
    trainer = make_trainer(tmp_path, model, storage=storage)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    twin = make_trainer(tmp_path, make_llama(kind=Fails), {"max_steps": 3}, storage=storage)
    twin.train()
    assert largest_difference(weights_of(model), weights_of(twin.model)) < 1e-6
    if isinstance(storage, Streamed):
        assert digest_of(model) == digest_of(twin.model)


@pytest.mark.slow
@pytest.mark.parametrize("seed_pool", [None, POOL], ids=["new seeds", "pool"])
def test_a_batch_for_which_memory_is_out_is_made_smaller(seed_pool: SeedPool | None, tmp_path: Path) -> None:
    model = make_llama(kind=Fails)
    model.error, model.at_rows = RuntimeError("CUDA out of memory."), 4
    arguments = {"auto_find_batch_size": True, "per_device_train_batch_size": 4, "save_strategy": "epoch"}
    trainer = make_trainer(tmp_path, model, arguments, seed_pool=seed_pool, storage=Streamed())
    trainer.train()
    small = {"per_device_train_batch_size": 3, "save_strategy": "epoch"}
    other = make_llama(kind=Fails)
    twin = make_trainer(tmp_path / "twin", other, small, seed_pool=seed_pool, storage=Streamed())
    twin.train()
    assert trainer.state.train_batch_size == 3
    assert trainer.state.global_step == 12
    assert losses_of(trainer) == losses_of(twin)
    assert digest_of(model) == digest_of(twin.model)
    if seed_pool is not None:
        ledgers = [folder / "checkpoint-12" / LEDGER for folder in (tmp_path, tmp_path / "twin")]
        assert ledgers[0].read_bytes() == ledgers[1].read_bytes()


@pytest.mark.slow
def test_a_resumed_run_begins_anew_at_its_checkpoint_with_a_smaller_batch(tmp_path: Path) -> None:
    """Weights and seeds are the checkpoint's again, as the ledger has them; Trainer goes on with its own."""
    arguments = {"per_device_train_batch_size": 4, "save_strategy": "steps", "save_steps": 6}
    options = {"seed_pool": POOL, "storage": Streamed()}
    make_trainer(tmp_path / "saved", make_llama(kind=Fails), arguments, **options).train()
    checkpoint = str(tmp_path / "saved" / "checkpoint-6")
    model, other = make_llama(kind=Fails), make_llama(kind=Fails)
    model.error, model.at_call = RuntimeError("CUDA out of memory."), 6
    found = {**arguments, "auto_find_batch_size": True}
    trainer = make_trainer(tmp_path / "found", model, found, **options)
    trainer.train(checkpoint)
    assert trainer.state.global_step == 12
    small = {**arguments, "per_device_train_batch_size": 3}
    make_trainer(tmp_path / "small", other, small, **options).train(checkpoint)
    assert digest_of(model) == digest_of(other)
    ledgers = [tmp_path / name / "checkpoint-12" / LEDGER for name in ("found", "small")]
    assert ledgers[0].read_bytes() == ledgers[1].read_bytes()
