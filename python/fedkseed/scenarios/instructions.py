"""Instruction rows around one model: training batches, held-out losses, answers and their table."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from tqdm import tqdm

from fedkseed._means import mean
from fedkseed._progress import each
from fedkseed.data.asking import Asking
from fedkseed.data.federated import ClientRows, FederatedData, Row
from fedkseed.data.models import ModelError, check_token_ids
from fedkseed.data.paper_rouge import paper_rouge_l, require_paper_rouge
from fedkseed.data.prompts import (
    Batch,
    Cuts,
    Encoded,
    Truncate,
    collate,
    encode_rows,
    iterate_batches,
    pad_token_id,
)
from fedkseed.data.scores import (
    exact_match,
    generate_greedy,
    majority_answer_scores,
    mean_response_loss,
    paired_response_losses,
    response_loss,
    response_nll,
    response_row_losses,
    rouge_l,
)
from fedkseed.scenarios.bench import digest_of, rows_digest_of
from fedkseed.scenarios.paired_difference import mean_difference
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
    "paper_rouge": "paper Rouge-L",
    "exact_match": "exact match",
}
#: Losses by row, of which the means are scores: kept until before and after are compared.
_BY_ROW = ("held_out", "unseen")


@dataclass(frozen=True)
class Scoring:
    """Which held-out rows of each client are looked at, and how.

    Attributes:
        round_rows: behind the losses of a round.
        final_rows: behind the losses before and after.
        generate_rows: answered for Rouge-L and exact match; 0: none.
        rouge_every: rounds between answers; 0: only before and after.
        round_unseen: whether a round has the loss of unseen clients' rows, too.
        mean: of losses, over all response tokens, or over rows of each row's own mean.
        answer_tokens: of an answer at most; 0: twice the longest of the rows that are asked, or
            `_MAX_NEW_TOKENS`.
        paper_rouge: whether answers are also scored by `paper_rouge_l`.
    """

    round_rows: int
    final_rows: int
    generate_rows: int = 0
    rouge_every: int = 0
    round_unseen: bool = False
    mean: Literal["tokens", "rows"] = "tokens"
    answer_tokens: int = 0
    paper_rouge: bool = False


class InstructionBench:
    """See `fedkseed.scenarios.bench.Bench`. Losses are in nats a response token; Rouge-L and exact match are
    means over rows, in [0, 1].

    Args:
        model: a causal language model, on any device.
        tokenizer: of the model.
        data: of kind "instructions".
        scoring: rows that are scored, and how.
        max_length: tokens of a row.
        is_paired: whether a loss is that of each half of a batch that is run twice (paired storage).
        truncate: what a row of more tokens loses, see `encode_rows`.
        data_size: what a client's data size counts: tokens of its responses, or rows.

    Raises:
        MissingExtraError: answers are to be scored by a package that is not installed.
        ModelError: the model does not write text.
        ValueError: a client none of whose training rows fits into the length, or a tokenizer without an
            end-of-text token.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        data: FederatedData,
        scoring: Scoring,
        max_length: int,
        is_paired: bool = False,
        truncate: Truncate = "prompt",
        data_size: Literal["tokens", "rows"] = "tokens",
    ) -> None:
        if scoring.paper_rouge:
            require_paper_rouge()
        if not model.can_generate():
            raise ModelError(
                f"expected a causal language model for instructions, got {type(model).__name__}; name one, "
                "or tune this one for a classification (--label)"
            )
        self.model = model
        self.asking = Asking(data.template)
        self.names = [client.name for client in data.clients]
        self._scoring, self._data, self._max_length = scoring, data, max_length
        self._truncate: Truncate = truncate
        self._sized_by_rows = data_size == "rows"
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
        self.rows_digest = rows_digest_of(data, scoring.final_rows)
        self.digest = digest_of(self._train, self._held_out, self._unseen)
        self.notes = [*data.notes, *cut_notes(self._cuts, max_length, truncate)]
        for name, rows in zip(self.names, self._train, strict=True):
            if not any(row.num_response for row in rows):
                raise ValueError(
                    f"expected rows of client {name} that fit into {max_length} tokens, got none whose "
                    "response does; raise max_length, or leave the client out"
                )

    def _encode(self, rows: Sequence[Row]) -> list[Encoded]:
        encoded, cuts = self._tokens_of(rows)
        self._cuts.append(cuts)
        return encoded

    def _tokens_of(self, rows: Sequence[Row]) -> tuple[list[Encoded], Cuts]:
        return encode_rows(self._tokenizer, rows, self._data.template, self._max_length, self._truncate)

    def _encode_held_out(self, clients: Sequence[ClientRows]) -> list[list[Encoded]]:
        return [self._encode(client.held_out[: self._scoring.final_rows]) for client in clients]

    def task(self) -> Task[Encoded, Batch]:
        """See `Bench.task`; a client's reply weighs as much as its training rows have response tokens, or as
        it has rows."""
        sizes = [sum(row.num_response for row in rows) for rows in self._train]
        return Task(
            model=self.model,
            datasets=self._train,
            collate=lambda rows: collate(rows, self._pad_id),
            loss=self._paired_losses if self._is_paired else self.train_loss,
            data_sizes=None if self._sized_by_rows else sizes,
            evaluate=lambda _, round: self.round_scores(round),
        )

    def batch_shapes(self, batch_size: int) -> tuple[list[BatchShape], list[BatchShape]]:
        """See `Bench.batch_shapes`."""
        is_shared = batch_size >= _LOSS_BATCH and not self._is_paired
        trained = [largest_batch(_lengths(rows), batch_size, cached=is_shared) for rows in self._train]
        held_out = [rows for rows in (*self._held_out, *self._unseen) if rows]
        evaluations = [largest_batch(_lengths(rows), _LOSS_BATCH, cached=True) for rows in held_out]
        if held_out and self._scoring.generate_rows:
            longest = max(row.num_prompt for rows in held_out for row in rows)
            cached = longest + (self._scoring.answer_tokens or _MAX_NEW_TOKENS)
            evaluations.append(BatchShape(_ANSWER_BATCH, longest, logits=1, cached=cached))
        return trained, evaluations

    def train_loss(self, model: torch.nn.Module, batch: Batch) -> float:
        """Mean loss over the batch's response tokens; NaN, a step that is skipped, where it has none."""
        if not batch.has_response:
            return math.nan
        # Of few rows a pass of its own over the weights costs more than the shared tokens save.
        share = len(batch.input_ids) >= _LOSS_BATCH
        nll, num_tokens = response_nll(model, batch, share_prefix=share)
        return nll / num_tokens

    def gradient_loss(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """See `Bench.gradient_loss`; NaN as `train_loss`."""
        if not batch.has_response:
            return torch.tensor(math.nan)
        return mean_response_loss(model, batch)

    def _paired_losses(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        if not batch.has_response:
            return torch.full((2,), math.nan, dtype=torch.float64)
        return paired_response_losses(model, batch)

    def round_scores(self, round: int) -> dict[str, float]:
        """See `Bench.round_scores`; the held-out rows are those of unseen clients where no other has any."""
        scoring = self._scoring
        parts = {"held_out_loss": self._held_out if any(self._held_out) else self._unseen}
        if scoring.round_unseen and any(self._held_out):
            parts["unseen_loss"] = self._unseen
        losses = {name: self._loss(name, part, scoring.round_rows)[0] for name, part in parts.items()}
        scores = {name: loss for name, loss in losses.items() if loss is not None}
        if scoring.rouge_every and (round + 1) % scoring.rouge_every == 0:
            scores.update(self._answer_scores())
        return scores

    def scores(self) -> dict[str, Any]:
        """See `Bench.scores`; with means over rows also the losses of each row, by which kind it is."""
        found: dict[str, Any] = {}
        by_row = {}
        for name, part in zip(_BY_ROW, (self._held_out, self._unseen), strict=True):
            found[f"{name}_loss"], by_row[name] = self._loss(f"{name}_loss", part, self._scoring.final_rows)
        if self._scoring.mean == "rows":
            found |= by_row
        return {**found, **self._answer_scores()}

    def _loss(
        self, name: str, clients: Sequence[Sequence[Encoded]], num_rows: int
    ) -> tuple[float | None, list[float]]:
        """The mean loss, None of no rows, and the losses of the rows where the mean is over them.

        Rows without a response token are left out, and from a mean over rows those whose loss is NaN.
        """
        # Rows of like length share a batch: padding costs as much as text.
        chosen = [
            batch
            for rows in clients
            for batch in iterate_batches(
                sorted(
                    (row for row in rows[:num_rows] if row.num_response), key=lambda row: len(row.input_ids)
                ),
                _LOSS_BATCH,
                self._pad_id,
            )
        ]
        if not chosen:
            return None, []
        device = next(self.model.parameters()).device
        bar = tqdm(chosen, desc=name.replace("_", " "), unit="batch", leave=False, disable=None)
        batches = (batch.to(device) for batch in bar)
        if self._scoring.mean == "tokens":
            return response_loss(self.model, batches, share_prefix=True), []
        losses = response_row_losses(self.model, batches, share_prefix=True)
        counted = [loss for loss in losses if not math.isnan(loss)]
        return (mean(counted) if counted else math.nan), losses

    def _answer_scores(self) -> dict[str, float]:
        """Scores of greedy answers to the first held-out rows of every client that is asked."""
        asked: list[tuple[Row, Encoded]] = []
        for client in self._asked_clients():
            for row in client.held_out[: self._scoring.generate_rows]:
                encoded, _ = self._tokens_of([row])
                asked += [(row, one) for one in encoded]
        if not asked:
            return {}
        longest = max(1, *(one.num_response for _, one in asked))
        answers = generate_greedy(
            self.model,
            self._tokenizer,
            [one.input_ids[: one.num_prompt] for _, one in asked],
            max_new_tokens=self._scoring.answer_tokens or min(2 * longest, _MAX_NEW_TOKENS),
            batch_size=_ANSWER_BATCH,
            progress=sys.stderr.isatty(),
            strip=False,
        )
        pairs = [(answer, row.response) for answer, (row, _) in zip(answers, asked, strict=True)]
        scores = {
            "rouge_l": mean(rouge_l(*pair) for pair in pairs),
            "exact_match": mean(exact_match(*pair) for pair in pairs),
        }
        if self._scoring.paper_rouge:
            scores["paper_rouge"] = mean(paper_rouge_l(*pair) for pair in pairs)
        return scores

    def _asked_clients(self) -> Sequence[ClientRows]:
        """Whose held-out rows are answered: those that train, or unseen ones where no other has any.

        To an unseen client, which has no training rows, those of all others are given: for majority answers.
        """
        data = self._data
        if any(client.held_out for client in data.clients):
            return data.clients
        everything = tuple(row for client in data.clients for row in client.train)
        return [ClientRows(client.name, everything, client.held_out) for client in data.unseen]

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
        if self._scoring.mean == "rows":
            head += ", means of each row's own mean"
        if self._scoring.generate_rows:
            kind = "" if any(client.held_out for client in self._data.clients) else "unseen "
            number = self._scoring.generate_rows
            head += f"; Rouge-L and exact match of the answers to {number} of each {kind}client"
        for name in _BY_ROW:
            if interval := rows["after"].get(f"{name}_difference"):
                estimate, low, high = (f"{bound:+.3f}" for bound in interval)
                name = name.replace("_", "-")
                lines.append(f"{name} loss after less before, 95 %: {estimate} [{low}, {high}]")
        return "\n".join([head, *lines])

    def summary(self, before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
        """See `Bench.summary`; with means over rows "after" has, for each kind of them, the mean difference
        of the same rows' losses with its 95 % interval."""
        rows: dict[str, dict[str, Any]] = {
            side: {name: score for name, score in scores.items() if name not in _BY_ROW}
            for side, scores in (("before", before), ("after", after))
        }
        for name in _BY_ROW:
            pairs = [
                pair
                for pair in zip(before.get(name, []), after.get(name, []), strict=True)
                if all(map(math.isfinite, pair))
            ]
            if len(pairs) > 1:
                interval = mean_difference([then for then, _ in pairs], [now for _, now in pairs])
                rows["after"][f"{name}_difference"] = [interval.estimate, interval.low, interval.high]
        if self._scoring.generate_rows:
            is_paper = self._scoring.paper_rouge
            majority = majority_answer_scores(
                self._asked_clients(), self._scoring.generate_rows, with_paper_rouge=is_paper
            )
            rows["majority answer"] = {
                "held_out_loss": None,
                "unseen_loss": None,
                "rouge_l": mean(score.rouge_l for score in majority),
                "exact_match": mean(score.exact_match for score in majority),
            }
            if is_paper:
                rows["majority answer"]["paper_rouge"] = mean(
                    score.paper_rouge for score in majority if score.paper_rouge is not None
                )
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


def cut_notes(cuts: Sequence[Cuts], max_length: int, truncate: Truncate = "prompt") -> list[str]:
    """What became of rows that were too long, a line each kind."""
    shortened, dropped = sum(cut.shortened for cut in cuts), sum(cut.dropped for cut in cuts)
    notes = []
    if truncate == "end":
        emptied = sum(cut.emptied for cut in cuts)
        if shortened:
            notes.append(f"{shortened} rows longer than {max_length} tokens lost what stands at their end")
        if emptied:
            notes.append(
                f"{emptied} of them lost their whole response: no loss, and no step, comes of them alone"
            )
        return notes
    if shortened:
        notes.append(f"{shortened} rows longer than {max_length} tokens lost the beginning of their prompt")
    if dropped:
        notes.append(f"{dropped} rows were left out: their response alone is longer than {max_length} tokens")
    return notes


def _lengths(rows: Sequence[Encoded]) -> list[tuple[int, int]]:
    return [(len(row.input_ids), row.num_prompt) for row in rows]


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
