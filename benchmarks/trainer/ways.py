"""One way to tune SmolLM2 with a Trainer, in one process: `python -m benchmarks.trainer.ways WAY`.

The process imports, resets the kernel's peak counter, loads the model, and runs `NUM_STEPS` steps of
Trainer's own loop, or its evaluation of as many batches; then it prints what that took.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import peft
import torch
import transformers.models.llama.modeling_llama
from transformers import Trainer, TrainerCallback, TrainingArguments

from benchmarks.common import memory
from benchmarks.common.constants import DTYPES
from fedkseed import Inplace, Streamed
from fedkseed.adapters.transformers import ZOTrainer
from fedkseed.data.models import load_causal_lm, load_tokenizer, smollm2_folder
from fedkseed.data.sentiment import load_sentiment

NUM_ROWS, NUM_TOKENS, NUM_STEPS = 4, 128, 5


@dataclass(frozen=True)
class Way:
    """How the model is tuned.

    Attributes:
        title: as a table has it.
        trainer: the class.
        dtype: of the weights, a key of `constants.DTYPES`.
        options: of a `ZOTrainer`.
        lora: tunes adapters of rank 8 on the projections of attention and MLP alone.
        is_evaluation: evaluates only.
    """

    title: str
    trainer: Callable[..., Any] = ZOTrainer
    dtype: str = "fp32"
    options: dict[str, Any] = field(default_factory=dict)
    lora: bool = False
    is_evaluation: bool = False


WAYS = {
    "evaluate": Way("`Trainer.evaluate`, nothing tuned", Trainer, is_evaluation=True),
    "inplace": Way("`ZOTrainer`, in place", options={"storage": Inplace()}),
    "chained": Way("`ZOTrainer`, chained", options={"storage": Inplace(chained=True)}),
    "streamed": Way("`ZOTrainer`, streamed", options={"storage": Streamed()}),
    "paired": Way("`ZOTrainer`, streamed, paired", options={"storage": Streamed(paired=True)}),
    "bf16": Way("`ZOTrainer`, weights in bf16, auto", dtype="bf16"),
    "zo-lora": Way("`ZOTrainer`, LoRA", options={"storage": Inplace()}, lora=True),
    "lora": Way("`Trainer`, LoRA, AdamW", Trainer, lora=True),
    "full": Way("`Trainer`, all weights, AdamW", Trainer),
}


class Clock(TrainerCallback):
    """Seconds of each step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._begin = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(time.perf_counter() - self._begin)


def rows() -> list[dict[str, list[int]]]:
    """Sentences of the sentiment data one after the other, cut into rows of NUM_TOKENS."""
    tokenizer = load_tokenizer(smollm2_folder())
    texts = ["".join(row.fields.values()) for client in load_sentiment().clients for row in client.train]
    tokens = tokenizer(" ".join(texts[: 40 * NUM_STEPS * NUM_ROWS])).input_ids
    cut = [tokens[i * NUM_TOKENS : (i + 1) * NUM_TOKENS] for i in range(NUM_STEPS * NUM_ROWS)]
    assert all(len(row) == NUM_TOKENS for row in cut)
    return [{"input_ids": row, "labels": row} for row in cut]


def run(way: Way, data: list[dict[str, list[int]]], folder: str, clock: Clock) -> None:
    """Loads the model and tunes it, or evaluates it."""
    model, _ = load_causal_lm(smollm2_folder(), DTYPES[way.dtype])
    if way.lora:
        projections = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        model = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules=projections))
    args = TrainingArguments(
        folder,
        per_device_train_batch_size=NUM_ROWS,
        per_device_eval_batch_size=NUM_ROWS,
        max_steps=NUM_STEPS,
        learning_rate=1e-6,
        prediction_loss_only=True,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    callbacks = [clock]
    trainer = way.trainer(
        model, args, train_dataset=data, eval_dataset=data, callbacks=callbacks, **way.options
    )
    if way.is_evaluation:
        begin = time.perf_counter()
        trainer.evaluate()
        clock.seconds.append((time.perf_counter() - begin) / NUM_STEPS)
    else:
        trainer.train()


def measure(name: str, num_threads: int) -> dict[str, Any]:
    """What one way takes, in this process: bytes beyond what stands after imports, seconds a step."""
    torch.set_num_threads(num_threads)
    logging.disable(logging.WARNING)
    data, clock = rows(), Clock()
    with tempfile.TemporaryDirectory() as folder:
        growth = memory.peak_growth(lambda: run(WAYS[name], data, folder, clock))
    # The first step prepares.
    seconds = clock.seconds[1:] or clock.seconds
    return {"way": name, "peak_bytes": growth, "seconds": float(np.median(seconds))}


def main() -> None:
    """Prints one way's figures as JSON, in the last line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.trainer.ways", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("way", choices=WAYS)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    print(json.dumps({**measure(options.way, options.threads), "transformers": transformers.__version__}))


if __name__ == "__main__":
    main()
