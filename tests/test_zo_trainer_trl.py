"""TRL's trainers without a backward pass, each by one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from support.data_samples import make_tokenizer
from support.tiny_language_model import make_model
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from fedkseed import ModelIdentity, NotStreamableError, SeedPool, Streamed
from fedkseed.adapters.transformers import ZOTrainerMixin

#: TRL 1.16 sets a field of transformers that the release beside it has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*is deprecated:FutureWarning")

TEXTS = [f"number {i} is odd: {i % 2}" for i in range(16)]
PAIRS = [{"prompt": f"{i}?", "chosen": " yes, it is", "rejected": " no"} for i in range(16)]
CONFIG: dict[str, Any] = {
    "max_steps": 4,
    "per_device_train_batch_size": 4,
    "logging_steps": 1,
    "learning_rate": 5e-2,
    "save_strategy": "no",
    "report_to": [],
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
}


class ZOSFTTrainer(ZOTrainerMixin, SFTTrainer):  # type: ignore[misc]
    """The one line."""


class ZODPOTrainer(ZOTrainerMixin, DPOTrainer):  # type: ignore[misc]
    """The one line."""


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")


def sft(folder: Path, config: dict[str, Any] | None = None, **options: Any) -> ZOSFTTrainer:
    rows = Dataset.from_list([{"text": text} for text in TEXTS])
    return ZOSFTTrainer(
        make_model(torch.float32),
        SFTConfig(str(folder), **{**CONFIG, "eval_strategy": "steps", "eval_steps": 2, **(config or {})}),
        train_dataset=rows,
        eval_dataset=rows.select(range(4)),
        processing_class=make_tokenizer(),
        **options,
    )


def of_step(trainer: Any, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def test_sft_trainer_tunes_and_tells_its_own_metrics_of_training_from_those_of_evaluation(
    tmp_path: Path,
) -> None:
    trainer = sft(tmp_path, seed_pool=SeedPool(1, 16))
    before = ModelIdentity.of(trainer.model).content
    trainer.train()
    assert ModelIdentity.of(trainer.model).content != before
    assert len(of_step(trainer, "projected_grad")) == len(of_step(trainer, "loss")) == 4
    assert len(of_step(trainer, "mean_token_accuracy")) == 4
    # One measurement of each evaluation's own: nothing of training came in between.
    accuracies = of_step(trainer, "eval_mean_token_accuracy")
    assert len(accuracies) == 2
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == of_step(trainer, "eval_loss")[-1]
    assert of_step(trainer, "eval_entropy")[-1] == of_step(trainer, "eval_entropy")[-2]


def test_the_loss_of_sft_trainer_is_that_of_its_own_loop_on_both_sides(tmp_path: Path) -> None:
    """Tokens are counted once over the micro-batches: two of two rows are the step of one of four."""
    whole = sft(tmp_path)
    whole.train()
    halves = sft(tmp_path, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2})
    halves.train()
    for key in ("loss", "projected_grad"):
        torch.testing.assert_close(
            torch.tensor(of_step(halves, key)), torch.tensor(of_step(whole, key)), rtol=2e-3, atol=2e-3
        )


def test_no_module_is_in_train_mode_but_for_the_flag_that_trl_reads(tmp_path: Path) -> None:
    trainer = sft(tmp_path)
    trainer.train()
    assert {module.training for module in trainer.model.children()} == {False}


def test_adapters_are_tuned_alone(tmp_path: Path) -> None:
    trainer = sft(tmp_path, peft_config=LoraConfig(r=2, target_modules=["q_proj"]))
    before = {name: weight.clone() for name, weight in trainer.model.named_parameters()}
    trainer.train()
    moved = {
        name for name, weight in trainer.model.named_parameters() if not torch.equal(weight, before[name])
    }
    assert moved == {name for name in before if "lora_" in name}


def test_streamed_storage_names_the_weight_that_trl_reads_past_its_module(tmp_path: Path) -> None:
    trainer = sft(tmp_path, storage=Streamed())
    before = ModelIdentity.of(trainer.model).content
    with pytest.raises(NotStreamableError, match=r"lm_head\.weight.*use storage=Inplace\(\)"):
        trainer.train()
    assert ModelIdentity.of(trainer.model).content == before


@pytest.mark.parametrize("adapted", [False, True], ids=["all weights", "adapters"])
def test_dpo_trainer_tunes(tmp_path: Path, adapted: bool) -> None:
    """The loss begins at ln 2, where model and reference agree, but for the perturbation."""
    trainer = ZODPOTrainer(
        make_model(torch.float32),
        ref_model=None if adapted else make_model(torch.float32),
        args=DPOConfig(str(tmp_path), **CONFIG),
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=make_tokenizer(),
        peft_config=LoraConfig(r=2, target_modules=["q_proj"]) if adapted else None,
    )
    before = ModelIdentity.of(trainer.model).content
    trainer.train()
    losses = of_step(trainer, "loss")
    assert losses[0] == pytest.approx(0.6931, abs=0.01)
    assert len(of_step(trainer, "rewards/margins")) == len(losses) == 4
    assert ModelIdentity.of(trainer.model).content != before
