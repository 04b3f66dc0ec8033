"""One process of several in which a zeroth-order Trainer runs: `test_zo_trainer_processes.py`.

    python -m torch.distributed.run ... -m support.trainer_process FOLDER

Writes what came out as FOLDER/RANK.json.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainingArguments

from fedkseed import ModelIdentity
from fedkseed.adapters.transformers import ZOTrainer
from support.tiny_language_model import make_model

NUM_STEPS, NUM_ROWS = 5, 8


class Steps(TrainerCallback):
    """g and the loss of each step."""

    def __init__(self) -> None:
        self.found: list[list[float]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        last = optimizer.optimizer.last
        self.found.append([last.loss, *last.projected_grads])


def rows() -> list[dict[str, torch.Tensor]]:
    """NUM_STEPS batches of rows of one length, whose numbers of labels differ."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, 120, (NUM_STEPS * NUM_ROWS, 12), generator=generator)
    labels = tokens.clone()
    for number in range(len(labels)):
        labels[number, : 1 + number % 7] = -100
    return [{"input_ids": row, "labels": label} for row, label in zip(tokens, labels, strict=True)]


def run(folder: Path, num_processes: int) -> None:
    """Trains, each process its share of every batch, and writes the file of this process."""
    args = TrainingArguments(
        str(folder),
        per_device_train_batch_size=NUM_ROWS // num_processes,
        max_steps=NUM_STEPS,
        learning_rate=5e-2,
        train_sampling_strategy="sequential",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    steps = Steps()
    trainer = ZOTrainer(make_model(torch.float32), args, train_dataset=rows(), callbacks=[steps])
    trainer.train()
    found = {
        "processes": trainer.accelerator.num_processes,
        "model": type(trainer.model_wrapped).__name__,
        "digest": ModelIdentity.of(trainer.model).content.hex(),
        "steps": steps.found,
        "logged": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
    }
    (folder / f"{trainer.accelerator.process_index}.json").write_text(json.dumps(found))


def main(folder: Path | None = None) -> None:
    """What a launcher starts in each process."""
    run(Path(sys.argv[1]) if folder is None else folder, int(os.environ.get("WORLD_SIZE", "1")))


if __name__ == "__main__":
    main()
