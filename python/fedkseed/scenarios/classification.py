"""Labelled rows around one model: training batches, losses, accuracies with intervals, and their table."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from fedkseed._progress import each
from fedkseed.data.architectures import ModelError, is_masked
from fedkseed.data.asking import Asking
from fedkseed.data.classification import (
    SCORED_BATCH,
    Classifier,
    LabelledBatch,
    LabelledTokens,
    Verbalizer,
    area_under_curve,
    collate_labelled,
    cross_entropies,
    encode_labelled,
    mask_token_id,
    score_rows,
)
from fedkseed.data.federated import ClientRows, FederatedData
from fedkseed.data.models import check_token_ids
from fedkseed.data.prompts import pad_token_id
from fedkseed.data.templates import MASK, Template
from fedkseed.scenarios import picture
from fedkseed.scenarios.accuracy_table import accuracy_table
from fedkseed.scenarios.bench import digest_of, rows_digest_of
from fedkseed.scenarios.paired_difference import (
    Interval,
    accuracy_interval,
    mean_difference,
    paired_difference,
)
from fedkseed.scenarios.threshold import best_threshold, drawn_rows
from fedkseed.scenarios.untuned_prompt import UntunedPrompt
from fedkseed.simulation.memory_plan import BatchShape
from fedkseed.simulation.task import Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Part:
    """The scored rows of one client: their tokens, and the client's most frequent training label."""

    name: str
    rows: tuple[LabelledTokens, ...]
    majority: int


class ClassificationBench:
    """See `fedkseed.scenarios.bench.Bench`. Losses are in nats a row, among the labels; accuracies in [0, 1].

    Args:
        model: a language model, or one with a classifier's head if the data has no words; a masked one
            answers in the template's place for a mask.
        tokenizer: of the model.
        data: of kind "classification".
        round_rows: held-out rows of each client behind the scores of a round.
        final_rows: those behind the scores before and after.
        max_length: tokens of a row; a longer one loses the beginning of its prompt.
        is_paired: whether a loss is that of each half of a batch that is run twice (paired storage).
        prompt: an untuned prompt that was measured on the same rows; None if there is none.
        threshold_rows: training rows of each client that a threshold is fitted on, to compare; 0: none is.
        seed: of the draw of these rows.

    Attributes:
        model, names, notes, digest, asking: as `Bench` says.
        classifier: how the model answers.

    Raises:
        DataError: a word that is not one token, or a row with a label that is not in the list.
        ValueError: a model with a head that cannot take these batches, no held-out rows, or a threshold
            between more than two labels.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        data: FederatedData,
        *,
        round_rows: int,
        final_rows: int,
        max_length: int,
        is_paired: bool = False,
        prompt: UntunedPrompt | None = None,
        threshold_rows: int = 0,
        seed: int = 0,
    ) -> None:
        self.model = model
        self._prompt, self._is_paired = prompt, is_paired
        self.asking = Asking(data.template, data.labels, data.words)
        self.names = [client.name for client in data.clients]
        self._labels = data.labels
        self._round_rows = round_rows
        self._pad_id = pad_token_id(tokenizer)
        verbalizer = None
        if data.words:
            check_speaks(model, data.template)
            verbalizer = Verbalizer.of(tokenizer, dict(zip(data.labels, data.words, strict=True)))
        else:
            _check_head(model, data.labels)
        mask_id = mask_token_id(tokenizer, data.template)
        self.classifier = Classifier(len(data.labels), verbalizer, self._pad_id, mask_id)
        self._num_cut = 0

        def encoded(rows: Sequence[Any]) -> list[LabelledTokens]:
            found, num_cut = encode_labelled(tokenizer, rows, data.template, data.labels, max_length)
            self._num_cut += num_cut
            return found

        def part(client: ClientRows, of: Iterable[ClientRows]) -> Part:
            answers = Counter(row.response for each in of for row in each.train)
            majority = min(data.labels, key=lambda label: (-answers[label], data.labels.index(label)))
            rows = tuple(encoded(client.held_out[:final_rows]))
            return Part(client.name, rows, data.labels.index(majority))

        training = each([client.train for client in data.clients], "rows to tokens")
        self._train = [encoded(rows) for rows in training]
        if threshold_rows and len(data.labels) != 2:
            raise ValueError(
                f"expected two labels for a threshold between them, got {len(data.labels)}; leave out "
                "--threshold-rows"
            )
        self._fitted = drawn_rows(self._train, threshold_rows, seed)
        self._parts = [part(client, [client]) for client in data.clients if client.held_out]
        # An unseen client has no training rows: its majority answer is that of all others.
        self._unseen = [part(client, data.clients) for client in data.unseen if client.held_out]
        if not self._parts and not self._unseen:
            raise ValueError("expected held-out rows of at least one client, got none; hold some out")
        cut = f"{self._num_cut:,} prompts lost their beginning: over {max_length} tokens"
        self.notes = [*data.notes, *([cut] if self._num_cut else [])]
        scored = ([part.rows for part in parts] for parts in (self._parts, self._unseen))
        everything = (*self._train, *(part.rows for part in (*self._parts, *self._unseen)))
        check_token_ids(model, (max(row.input_ids) for rows in everything for row in rows))
        self.rows_digest = rows_digest_of(data, final_rows)
        self.digest = digest_of(self._train, *scored)

    def task(self) -> Task[LabelledTokens, LabelledBatch]:
        """See `Bench.task`; a client's reply weighs as much as its rows."""
        return Task(
            model=self.model,
            datasets=self._train,
            collate=lambda rows: collate_labelled(rows, self._pad_id),
            loss=self.classifier.paired_losses if self._is_paired else self.classifier.loss,
            evaluate=lambda _, round: self.round_scores(round),
        )

    def gradient_loss(self, model: torch.nn.Module, batch: LabelledBatch) -> torch.Tensor:
        """See `Bench.gradient_loss`."""
        return self.classifier.mean_loss(model, batch)

    def batch_shapes(self, batch_size: int) -> tuple[list[BatchShape], list[BatchShape]]:
        """See `Bench.batch_shapes`."""
        trained = [row for rows in self._train for row in rows]
        scored = [row for part in (*self._parts, *self._unseen) for row in part.rows]
        has_all = is_masked(self.model)
        return [_shape(trained, batch_size, has_all)], [_shape(scored, SCORED_BATCH, has_all)]

    def round_scores(self, round: int) -> dict[str, float]:
        """Loss and accuracy on the first held-out rows of every client; empty if no rows are asked for."""
        rows = [row for part in self._parts or self._unseen for row in part.rows[: self._round_rows]]
        if not rows:
            return {}
        logits = self._logits(rows, "held-out rows")
        labels = torch.tensor([row.label for row in rows])
        return {
            "held_out_loss": float(cross_entropies(logits, labels).mean()),
            "accuracy": float((logits.argmax(dim=1) == labels).double().mean()),
        }

    def scores(self) -> dict[str, Any]:
        """Scores of the model as it stands on all chosen held-out rows.

        "held_out" and "unseen" hold, if there are such rows, "rows", "loss", "accuracy" (estimate, low,
        high), "auc" (of two labels), "losses" of the rows, "right": client -> 0 or 1 of each row, and, if one
        is asked for, "threshold": its "value", the "rows" that it is fitted on, "accuracy" and "right" with
        it.
        """
        threshold = self._threshold() if self._fitted else None
        found = {}
        for name, parts in (("held_out", self._parts), ("unseen", self._unseen)):
            if parts:
                found[name] = self._part_scores(parts, name.replace("_", "-"), threshold)
        return found

    def _threshold(self) -> float:
        """That of the model as it stands, in place of 0."""
        logits = self._logits(self._fitted, "training rows")
        return best_threshold(_margins(logits), [row.label == 1 for row in self._fitted])

    def _part_scores(self, parts: Sequence[Part], name: str, threshold: float | None) -> dict[str, Any]:
        rows = [row for part in parts for row in part.rows]
        logits = self._logits(rows, f"{name} rows")
        labels = torch.tensor([row.label for row in rows])
        right = (logits.argmax(dim=1) == labels).long().tolist()
        losses = cross_entropies(logits, labels)
        found: dict[str, Any] = {
            "rows": len(rows),
            "loss": float(losses.mean()),
            "losses": losses.tolist(),
            "accuracy": _ready(accuracy_interval(sum(right), len(right))),
            "right": _by_part(parts, right),
        }
        if len(self._labels) == 2:
            margins = _margins(logits)
            found["auc"] = area_under_curve(margins, labels.bool().tolist())
        if threshold is not None:
            right = [
                int((margin > threshold) == (row.label == 1))
                for margin, row in zip(margins, rows, strict=True)
            ]
            found["threshold"] = {
                "value": threshold,
                "rows": len(self._fitted),
                "accuracy": _ready(accuracy_interval(sum(right), len(right))),
                "right": _by_part(parts, right),
            }
        return found

    def _logits(self, rows: Sequence[LabelledTokens], name: str) -> torch.Tensor:
        bar = functools.partial(tqdm, desc=name, unit="batch", leave=False, disable=None)
        device = next(self.model.parameters()).device
        return score_rows(self.classifier, self.model, rows, self._pad_id, device=device, progress=bar)

    def summary(self, before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
        """Per kind of rows: scores before and after, and "clients": rows, accuracies, the paired difference.

        "all" beside "clients" has the same over all rows; "majority" is the share that a client's most
        frequent training label answers. "loss_difference" is that of the same rows' losses, of two or more.
        "threshold", if one was asked for, has its "value" and the "accuracy" with it before and after, the
        "rows" that it was fitted on, and the paired "difference": accuracy after without it less accuracy
        before with it.
        """
        found = {}
        for name, parts in (("held_out", self._parts), ("unseen", self._unseen)):
            if not parts:
                continue
            then, now = before[name], after[name]
            compared = {
                part.name: _compared([part], then["right"], now["right"], self._labels) for part in parts
            }
            found[name] = {
                "loss": [then["loss"], now["loss"]],
                **_loss_difference(then["losses"], now["losses"]),
                **({"auc": [then["auc"], now["auc"]]} if "auc" in then else {}),
                "clients": compared,
                "all": _compared(parts, then["right"], now["right"], self._labels),
                **({"threshold": _threshold_compared(then, now)} if "threshold" in then else {}),
            }
        return found

    def table(self, before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
        """Accuracies before and after by client with the 95 % interval of their paired difference, and what
        each client's majority answer gives on the same rows."""
        tables = [
            accuracy_table(name.replace("_", "-"), found)
            for name, found in self.summary(before, after).items()
        ]
        if self._prompt is not None:
            estimate, low, high = self._prompt.accuracy
            answers = " or ".join(map(repr, self._prompt.words))
            tables.append(
                f"Beside it, without any tuning: the prompt {self._prompt.template!r}, answered by "
                f"{answers}, is right in {estimate:.3f} [{low:.3f}, {high:.3f}] of the same rows (measured "
                "once, benchmarks/results/sentiment-prompts.json). The prompt that is tuned here begins by "
                "saying positive to nearly everything; much of the gain is that this ends."
            )
        return "\n\n".join(tables)

    def draw(
        self,
        target: Path,
        rounds: Sequence[Mapping[str, Any]],
        summary: Mapping[str, Any],
        weight_bytes: int,
    ) -> None:
        """See `Bench.draw`."""
        compared = summary.get("held_out") or summary["unseen"]
        picture.draw(
            target, rounds, compared, weight_bytes, self._prompt.accuracy[0] if self._prompt else None
        )


def check_speaks(model: PreTrainedModel, template: Template) -> None:
    """Checks that a model answers by words: behind the prompt, or in the template's place for a mask.

    Raises:
        ModelError: it does not, or not there.
    """
    name = type(model).__name__
    if is_masked(model):
        if not template.num_masks:
            raise ModelError(
                f"expected a template with {MASK}, in whose place {name} answers, got "
                f"{template.text[:80]!r}; write one, --template '{{text}} It was {MASK}.', say"
            )
    elif not model.can_generate():
        raise ModelError(
            f"expected a language model for words, got {name}; name one, or a model with a classifier's head "
            "(--classify head)"
        )
    elif template.num_masks:
        raise ModelError(
            f"expected a masked language model for {MASK} in the template, got {name}, which answers behind "
            "the prompt; name another model or template"
        )


def _check_head(model: PreTrainedModel, labels: Sequence[str]) -> None:
    num_labels = getattr(model.config, "num_labels", None)
    if num_labels != len(labels):
        raise ValueError(
            f"expected a classifier's head with a logit for each of {len(labels)} labels, got {num_labels} "
            f"from {type(model).__name__}; load it with num_labels={len(labels)}, or classify by words"
        )


def _shape(rows: Sequence[LabelledTokens], batch_size: int, has_all: bool) -> BatchShape:
    """The largest batch of these rows, each with one position that is read: another one in each, at worst.

    Args:
        rows: that it is drawn of.
        batch_size: of it.
        has_all: whether the model gives the logits of every position.
    """
    width, size = max(len(row.input_ids) for row in rows), min(batch_size, len(rows))
    return BatchShape(size, width, logits=width if has_all else min(size, width), scored=1)


def _by_part(parts: Sequence[Part], values: Sequence[int]) -> dict[str, list[int]]:
    found, start = {}, 0
    for part in parts:
        found[part.name] = list(values[start : start + len(part.rows)])
        start += len(part.rows)
    return found


def _compared(
    parts: Sequence[Part],
    before: Mapping[str, Sequence[int]],
    after: Mapping[str, Sequence[int]],
    labels: Sequence[str],
) -> dict[str, Any]:
    then, now = ([bool(x) for part in parts for x in side[part.name]] for side in (before, after))
    majority = [row.label == part.majority for part in parts for row in part.rows]
    found = {
        "rows": len(now),
        "before": _ready(accuracy_interval(sum(then), len(then))),
        "after": _ready(accuracy_interval(sum(now), len(now))),
        "difference": _ready(paired_difference(then, now)),
        "majority": sum(majority) / len(majority),
    }
    if len(parts) == 1:
        found["majority_label"] = labels[parts[0].majority]
    return found


def _loss_difference(before: Sequence[float], after: Sequence[float]) -> dict[str, list[float]]:
    if len(before) < 2 or not all(map(math.isfinite, (*before, *after))):
        return {}
    return {"loss_difference": _ready(mean_difference(before, after))}


def _threshold_compared(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    pair = (before["threshold"], after["threshold"])
    shifted, tuned = (
        [bool(value) for own in right.values() for value in own]
        for right in (pair[0]["right"], after["right"])
    )
    return {
        "value": [found["value"] for found in pair],
        "rows": pair[0]["rows"],
        "accuracy": [found["accuracy"] for found in pair],
        "difference": _ready(paired_difference(shifted, tuned)),
    }


def _margins(logits: torch.Tensor) -> list[float]:
    """The second label's logit less the first one's, of each row."""
    found: list[float] = (logits[:, 1].double() - logits[:, 0].double()).tolist()
    return found


def _ready(interval: Interval) -> list[float]:
    return [interval.estimate, interval.low, interval.high]
