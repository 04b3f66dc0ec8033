"""Support for tests of the zeroth-order Trainer: a Llama of two small layers, rows, arguments and twins."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from fedkseed.adapters.transformers import ZOTrainer, ZOTrainerMixin
from fedkseed.model.identity import ModelIdentity

_VOCABULARY, _LENGTH = 40, 7
#: Of a step that moves the tiny model's losses visibly, and none of them out of bounds.
EPS, LR = 1e-2, 1e-3


def make_llama(
    dtype: torch.dtype = torch.float32, dropout: float = 0.0, kind: type[LlamaForCausalLM] = LlamaForCausalLM
) -> LlamaForCausalLM:
    """The same weights each time, in eval mode, whatever the ambient generators are at; they stay there."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        config = LlamaConfig(
            vocab_size=_VOCABULARY,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=32,
            attention_dropout=dropout,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
        return kind(config).to(dtype).eval()


class Rows(Dataset[dict[str, torch.Tensor]]):
    """Random tokens; unless all labels count, those at a row's beginning do not, another number each."""

    def __init__(self, number: int = 24, seed: int = 2, all_count: bool = False) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._all_count = all_count
        self._tokens = torch.randint(3, _VOCABULARY, (number, _LENGTH), generator=generator)

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = self._tokens[index]
        labels = tokens.clone()
        if not self._all_count:
            labels[: index % (_LENGTH - 2)] = -100
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}


def make_arguments(folder: Path, **changes: Any) -> TrainingArguments:
    """Twelve steps of two rows on the processor; nothing is saved, evaluated or reported."""
    given: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "max_steps": 12,
        "per_device_train_batch_size": 2,
        "learning_rate": LR,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        **changes,
    }
    return TrainingArguments(**given)


def make_trainer(
    folder: Path,
    model: nn.Module | None = None,
    arguments: Mapping[str, Any] | None = None,
    kind: type[Any] = ZOTrainer,
    **options: Any,
) -> Any:
    """A Trainer of the tiny model over the rows.

    Args:
        arguments: of `make_arguments`.
        kind: of the Trainer, zeroth-order or not.
        options: of the Trainer.
    """
    given: dict[str, Any] = {"train_dataset": Rows()}
    if issubclass(kind, ZOTrainerMixin):
        given["eps"] = EPS
    return kind(
        make_llama() if model is None else model,
        make_arguments(folder, **(arguments or {})),
        **{**given, **options},
    )


def losses_of(trainer: Any) -> list[float]:
    """The loss of each step, as logged."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def digest_of(model: nn.Module) -> bytes:
    """What is equal if each bit of the weights is."""
    return ModelIdentity.of(model).content


def stir(seed: int) -> None:
    """Leaves the ambient generators at another state than any run began at."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
