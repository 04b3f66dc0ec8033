"""Instruction rows around one model: training batches, held-out losses, answers and their table."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from fedkseed._means import mean
from fedkseed._progress import each
from fedkseed.data.asking import Asking
from fedkseed.data.federated import ClientRows, FederatedData, Row
from fedkseed.data.models import ModelError, check_token_ids
from fedkseed.data.prompts import Batch, Cuts, Encoded, collate, encode_rows, iterate_batches, pad_token_id
from fedkseed.data.scores import (
    exact_match,
    generate_greedy,
    majority_answer_scores,
    paired_response_losses,
    response_loss,
    response_nll,
    rouge_l,
)
from fedkseed.scenarios.bench import digest_of, rows_digest_of
from fedkseed.scenarios.round_picture import draw_rounds
from fedkseed.simulation.memory_plan import BatchShape, largest_batch
from fedkseed.simulation.task import Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_LOSS_BATCH = 8
_ANSWER_BATCH = 16
#: An answer is cut after twice the longest answer of the rows that are asked, or after so many tokens.
_MAX_NEW_TOKENS = 128

_COLUMNS = {
    "held_out_loss": "held-out loss",
    "unseen_loss": "unseen loss",
    "rouge_l": "Rouge-L",
    "exact_match": "exact match",
}


@dataclass(frozen=True)
class RowLimits:
    """How many held-out rows of each client are looked at.

    Attributes:
        round_rows: behind the losses of a round.
        final_rows: behind the losses before and after.
        generate_rows: answered for Rouge-L and exact match; 0: none.
        rouge_every: rounds between answers; 0: only before and after.
    """

    round_rows: int
    final_rows: int
    generate_rows: int
    rouge_every: int


class InstructionBench:
    """See `fedkseed.scenarios.bench.Bench`. Losses are in nats a response token; Rouge-L and exact match are
    means over rows, in [0, 1].

    Args:
        model: a causal language model, on any device.
        tokenizer: of the model.
        data: of kind "instructions".
        limits: rows that are scored.
        max_length: tokens of a row.
        is_paired: whether a loss is that of each half of a batch that is run twice (paired storage).

    Raises:
        ModelError: the model does not write text.
        ValueError: a client none of whose training rows fits into the length, or a tokenizer without an
            end-of-text token.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        data: FederatedData,
        limits: RowLimits,
        max_length: int,
        is_paired: bool = False,
    ) -> None:
        if not model.can_generate():
            raise ModelError(
                f"expected a causal language model for instructions, got {type(model).__name__}; name one, "
                "or tune this one for a classification (--label)"
            )
        self.model = model
        self.asking = Asking(data.template)
        self.names = [client.name for client in data.clients]
        self._limits, self._data, self._max_length = limits, data, max_length
        self._tokenizer = tokenizer
        self._pad_id = pad_token_id(tokenizer)
        self._is_paired = is_paired
        self._cuts: list[Cuts] = []
        training = each([client.train for client in data.clients], "rows to tokens")
        self._train = [self._encode(rows) for rows in training]
        self._held_out = self._encode_held_out(data.clients)
        self._unseen = self._encode_held_out(data.unseen)
        everything = (*self._train, *self._held_out, *self._unseen)
        check_token_ids(model, (max(row.input_ids) for rows in everything for row in rows))
        self.rows_digest = rows_digest_of(data, limits.final_rows)
        self.digest = digest_of(self._train, self._held_out, self._unseen)
        self.notes = [*data.notes, *cut_notes(self._cuts, max_length)]
        for name, rows in zip(self.names, self._train, strict=True):
            if not rows:
                raise ValueError(
                    f"expected rows of client {name} that fit into {max_length} tokens, got none whose "
                    "response does; raise max_length, or leave the client out"
                )

    def _encode(self, rows: Sequence[Row]) -> list[Encoded]:
        encoded, cuts = encode_rows(self._tokenizer, rows, self._data.template, self._max_length)
        self._cuts.append(cuts)
        return encoded

    def _encode_held_out(self, clients: Sequence[ClientRows]) -> list[list[Encoded]]:
        return [self._encode(client.held_out[: self._limits.final_rows]) for client in clients]

    def task(self) -> Task[Encoded, Batch]:
        """See `Bench.task`; a client's reply weighs as much as its training rows have response tokens."""
        return Task(
            model=self.model,
            datasets=self._train,
            collate=lambda rows: collate(rows, self._pad_id),
            loss=paired_response_losses if self._is_paired else self.train_loss,
            data_sizes=[sum(len(row.input_ids) - row.num_prompt for row in rows) for rows in self._train],
            evaluate=lambda _, round: self.round_scores(round),
        )

    def batch_shapes(self, batch_size: int) -> tuple[list[BatchShape], list[BatchShape]]:
        """See `Bench.batch_shapes`."""
        is_shared = batch_size >= _LOSS_BATCH and not self._is_paired
        trained = [largest_batch(_lengths(rows), batch_size, cached=is_shared) for rows in self._train]
        held_out = [rows for rows in (*self._held_out, *self._unseen) if rows]
        evaluations = [largest_batch(_lengths(rows), _LOSS_BATCH, cached=True) for rows in held_out]
        if held_out and self._limits.generate_rows:
            longest = max(row.num_prompt for rows in held_out for row in rows)
            evaluations.append(BatchShape(_ANSWER_BATCH, longest, logits=1, cached=longest + _MAX_NEW_TOKENS))
        return trained, evaluations

    def train_loss(self, model: torch.nn.Module, batch: Batch) -> float:
        """Mean loss over the batch's response tokens."""
        # Few rows save fewer tokens by a shared prefix than its own pass over the weights costs.
        share = len(batch.input_ids) >= _LOSS_BATCH
        nll, num_tokens = response_nll(model, batch, share_prefix=share)
        return nll / num_tokens

    def round_scores(self, round: int) -> dict[str, float]:
        """See `Bench.round_scores`."""
        scores: dict[str, float] = {}
        loss = self._loss("held-out loss", self._held_out, self._limits.round_rows)
        if loss is not None:
            scores["held_out_loss"] = loss
        if self._limits.rouge_every and (round + 1) % self._limits.rouge_every == 0:
            scores.update(self._answer_scores())
        return scores

    def scores(self) -> dict[str, Any]:
        """See `Bench.scores`."""
        return {
            "held_out_loss": self._loss("held-out loss", self._held_out, self._limits.final_rows),
            "unseen_loss": self._loss("unseen loss", self._unseen, self._limits.final_rows),
            **self._answer_scores(),
        }

    def _loss(self, name: str, clients: Sequence[Sequence[Encoded]], num_rows: int) -> float | None:
        # Rows of like length share a batch: padding costs as much as text.
        chosen = [
            batch
            for rows in clients
            for batch in iterate_batches(
                sorted(rows[:num_rows], key=lambda row: len(row.input_ids)), _LOSS_BATCH, self._pad_id
            )
        ]
        if not chosen:
            return None
        device = next(self.model.parameters()).device
        bar = tqdm(chosen, desc=name, unit="batch", leave=False, disable=None)
        return response_loss(self.model, (batch.to(device) for batch in bar), share_prefix=True)

    def _answer_scores(self) -> dict[str, float]:
        """Scores of greedy answers to the first held-out rows of every client."""
        asked: list[tuple[Row, Encoded]] = []
        for client in self._data.clients:
            for row in client.held_out[: self._limits.generate_rows]:
                encoded, _ = encode_rows(self._tokenizer, [row], self._data.template, self._max_length)
                asked += [(row, one) for one in encoded]
        if not asked:
            return {}
        longest = max(len(one.input_ids) - one.num_prompt for _, one in asked)
        answers = generate_greedy(
            self.model,
            self._tokenizer,
            [one.input_ids[: one.num_prompt] for _, one in asked],
            max_new_tokens=min(2 * longest, _MAX_NEW_TOKENS),
            batch_size=_ANSWER_BATCH,
            progress=sys.stderr.isatty(),
        )
        pairs = [(answer, row.response) for answer, (row, _) in zip(answers, asked, strict=True)]
        return {
            "rouge_l": mean(rouge_l(*pair) for pair in pairs),
            "exact_match": mean(exact_match(*pair) for pair in pairs),
        }

    def table(self, before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
        """See `Bench.table`."""
        rows = self.summary(before, after)
        columns = [name for name in _COLUMNS if any(scores.get(name) is not None for scores in rows.values())]
        lines = [" " * 16 + "".join(_COLUMNS[name].rjust(15) for name in columns)]
        for name, scores in rows.items():
            cells = [_cell(scores.get(column)).rjust(15) for column in columns]
            lines.append(name.ljust(16) + "".join(cells))
        head = f"Losses on {sum(map(len, self._held_out))} held-out rows of the clients"
        if self._unseen:
            head += f" and {sum(map(len, self._unseen))} of unseen ones"
        if self._limits.generate_rows:
            head += f"; Rouge-L and exact match of the answers to {self._limits.generate_rows} of each client"
        return "\n".join([head, *lines])

    def summary(self, before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
        """See `Bench.summary`."""
        rows = {"before": dict(before), "after": dict(after)}
        if self._limits.generate_rows:
            majority = majority_answer_scores(self._data.clients, self._limits.generate_rows)
            rows["majority answer"] = {
                "held_out_loss": None,
                "unseen_loss": None,
                "rouge_l": mean(score.rouge_l for score in majority),
                "exact_match": mean(score.exact_match for score in majority),
            }
        return rows

    def draw(
        self,
        target: Path,
        rounds: Sequence[Mapping[str, Any]],
        summary: Mapping[str, Any],
        weight_bytes: int,
    ) -> None:
        """See `Bench.draw`."""
        draw_rounds(rounds, target)


def cut_notes(cuts: Sequence[Cuts], max_length: int) -> list[str]:
    """What became of rows that were too long, a line each kind."""
    shortened, dropped = sum(cut.shortened for cut in cuts), sum(cut.dropped for cut in cuts)
    notes = []
    if shortened:
        notes.append(f"{shortened} rows longer than {max_length} tokens lost the beginning of their prompt")
    if dropped:
        notes.append(f"{dropped} rows were left out: their response alone is longer than {max_length} tokens")
    return notes


def _lengths(rows: Sequence[Encoded]) -> list[tuple[int, int]]:
    return [(len(row.input_ids), row.num_prompt) for row in rows]


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
