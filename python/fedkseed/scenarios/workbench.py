"""Instruction tasks around one model: training batches, held-out scores, and the table of scores."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

from fedkseed._means import mean
from fedkseed.data import Example, Task
from fedkseed.data.prompts import (
    Batch,
    Encoded,
    PromptStyle,
    collate,
    encode_example,
    encode_prompt,
    iterate_batches,
    pad_token_id,
)
from fedkseed.data.scores import (
    exact_match,
    generate_greedy,
    majority_answer_scores,
    response_loss,
    response_nll,
    rouge_l,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_LOSS_BATCH = 8
_ANSWER_BATCH = 16
_MAX_NEW_TOKENS = 26  # the longest answer of the data has 24


@dataclass(frozen=True)
class Scores:
    """How good the model (or an answer) is; ``None`` where the question makes no sense.

    Losses are in nats a response token; Rouge-L and exact match are means over rows, in [0, 1].
    """

    held_out_loss: float | None
    unseen_loss: float | None
    rouge_l: float
    exact_match: float


class Workbench:
    """The model, its tasks as tokens, and how they are scored.

    Rows of one batch belong to one task, so their common instruction runs through the model once.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        tasks: Sequence[Task],
        unseen: Sequence[Task],
        style: PromptStyle,
    ) -> None:
        self.model = model
        self.tasks = tasks
        self._tokenizer = tokenizer
        self._style = style
        self._pad_id = pad_token_id(tokenizer)
        self.train = [self._encode(task.train) for task in tasks]
        self._test = [self._encode(task.test) for task in tasks]
        self._unseen = [self._encode(task.test) for task in unseen]

    def _encode(self, rows: Sequence[Example]) -> list[Encoded]:
        return [encode_example(self._tokenizer, row, self._style) for row in rows]

    def response_tokens(self) -> list[int]:
        """Response tokens in each client's training rows: its part in a loss over all of them."""
        return [sum(len(row.input_ids) - row.num_prompt for row in rows) for rows in self.train]

    def collate(self, rows: Sequence[Encoded]) -> Batch:
        """A training batch."""
        return collate(rows, self._pad_id)

    def train_loss(self, model: torch.nn.Module, batch: Batch) -> float:
        """Mean loss over the batch's response tokens, in nats."""
        # Few rows save fewer tokens by a shared prefix than its own pass over the weights costs.
        share = len(batch.input_ids) >= _LOSS_BATCH
        nll, num_tokens = response_nll(model, batch, share_prefix=share)
        return nll / num_tokens

    def held_out_loss(self, num_rows: int) -> float:
        """Loss on the first test rows of every client task."""
        return self._loss("held-out loss", self._test, num_rows)

    def _loss(self, name: str, tasks: Sequence[Sequence[Encoded]], num_rows: int) -> float:
        # Rows of like length share a batch: padding costs as much as text.
        chosen = [
            batch
            for rows in tasks
            for batch in iterate_batches(
                sorted(rows[:num_rows], key=lambda row: len(row.input_ids)), _LOSS_BATCH, self._pad_id
            )
        ]
        bar = tqdm(chosen, desc=name, unit="batch", leave=False, disable=None)
        return response_loss(self.model, bar, share_prefix=True)

    def scores(self, num_rows: int, num_generated: int) -> Scores:
        """Losses on ``num_rows`` test rows of each task, answers to ``num_generated`` of each client task."""
        rouge, exact = self.answer_scores(num_generated)
        return Scores(
            held_out_loss=self.held_out_loss(num_rows),
            unseen_loss=self._loss("unseen loss", self._unseen, num_rows),
            rouge_l=rouge,
            exact_match=exact,
        )

    def answer_scores(self, num_rows: int) -> tuple[float, float]:
        """(Rouge-L, exact match) of greedy answers to the first test rows of every client task."""
        asked = [row for task in self.tasks for row in task.test[:num_rows]]
        answers = generate_greedy(
            self.model,
            self._tokenizer,
            [encode_prompt(self._tokenizer, row, self._style) for row in asked],
            max_new_tokens=_MAX_NEW_TOKENS,
            batch_size=_ANSWER_BATCH,
            progress=sys.stderr.isatty(),
        )
        pairs = [(answer, row.output) for answer, row in zip(answers, asked, strict=True)]
        return mean(rouge_l(*pair) for pair in pairs), mean(exact_match(*pair) for pair in pairs)

    def majority_scores(self, num_generated: int) -> Scores:
        """What always giving each task's most frequent training answer scores on the same rows."""
        shortened = [dataclasses.replace(task, test=task.test[:num_generated]) for task in self.tasks]
        majority = majority_answer_scores(shortened)
        return Scores(
            held_out_loss=None,
            unseen_loss=None,
            rouge_l=mean(score.rouge_l for score in majority),
            exact_match=mean(score.exact_match for score in majority),
        )


def scores_table(rows: Mapping[str, Scores]) -> str:
    """Scores side by side, one row a name."""

    def cell(value: float | None) -> str:
        return ("-" if value is None else f"{value:.3f}").rjust(13)

    names = ("held-out loss", "unseen loss", "Rouge-L", "exact match")
    lines = [" " * 16 + "".join(name.rjust(15) for name in names)]
    for name, scores in rows.items():
        values = (scores.held_out_loss, scores.unseen_loss, scores.rouge_l, scores.exact_match)
        lines.append(name.ljust(16) + "".join("  " + cell(value) for value in values))
    return "\n".join(lines)
