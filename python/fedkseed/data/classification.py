"""Rows that are answered with one label out of few: by the words that answer it, or by a classifier's head.

Shapes: B rows of a batch, T tokens of its longest row, L labels.
"""

from __future__ import annotations

import inspect
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from fedkseed.data.errors import DataError
from fedkseed.data.federated import Row
from fedkseed.data.prompts import padded
from fedkseed.data.templates import MASK, Template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


#: Rows that are scored together.
SCORED_BATCH = 16


@dataclass(frozen=True)
class Verbalizer:
    """The token that answers each label: a prompt's answer is the label whose token is the likeliest."""

    token_ids: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, words: Mapping[str, str]) -> Verbalizer:
        """The tokens of the labels' words.

        Args:
            tokenizer: of the model.
            words: label -> the text that follows the prompt, with its leading space if the model's words
                have one.

        Raises:
            DataError: fewer than two labels, a word that is not one token, or two of one token.
        """
        if len(words) < 2:
            raise DataError(
                f"expected words for at least two labels, got {len(words)}; name one for each label"
            )
        found: dict[int, str] = {}
        for label, word in words.items():
            token_ids = [int(token_id) for token_id in tokenizer(word, add_special_tokens=False).input_ids]
            unknown = tokenizer.unk_token_id
            if len(token_ids) != 1 or token_ids[0] == unknown:
                got = "an unknown one" if token_ids == [unknown] else str(len(token_ids) or "none")
                hint = "" if word.startswith(" ") else f" (with a space before it? {' ' + word!r})"
                raise DataError(
                    f"expected a word of one token for the label {label!r}, got {got} for {word!r}; "
                    f"name another word{hint}"
                )
            if token_ids[0] in found:
                raise DataError(
                    f"expected another token for each label, got one for {found[token_ids[0]]!r} and "
                    f"{label!r}; name another word"
                )
            found[token_ids[0]] = label
        return cls(tuple(found))


@dataclass(frozen=True)
class LabelledTokens:
    """A prompt as tokens, and the number of its label."""

    input_ids: tuple[int, ...]
    label: int


@dataclass(frozen=True)
class LabelledBatch:
    """Right-padded prompts: ``input_ids`` and ``attention_mask`` of shape (B, T), ``labels`` (B,), int64."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor

    def to(self, device: torch.device | str) -> LabelledBatch:
        """The same batch on another device."""
        return LabelledBatch(
            self.input_ids.to(device), self.attention_mask.to(device), self.labels.to(device)
        )


def encode_labelled(
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    template: Template,
    labels: Sequence[str],
    max_length: int,
) -> tuple[list[LabelledTokens], int]:
    """Prompts as tokens, and how many of them lost their beginning since they have over ``max_length``.

    Special tokens that the tokenizer puts around a prompt stay: an encoder's head reads the first one. So
    does the template's mask token; once nothing is left before it, what follows it is lost from its end.

    Raises:
        DataError: a row whose response is none of the labels, an empty prompt, a text that spells out the
            mask token, or see `mask_token_id`.
    """
    mask_id = mask_token_id(tokenizer, template)
    numbers = {label: number for number, label in enumerate(labels)}
    found, num_cut = [], 0
    for row in rows:
        if row.response not in numbers:
            raise DataError(f"expected a label out of {list(labels)}, got {row.response!r}")
        prompt = template.prompt(tokenizer, row.fields)
        token_ids = tokenizer(prompt, add_special_tokens=template.adds_special_tokens).input_ids
        if not token_ids:
            raise DataError(f"expected a prompt of at least one token, got none for {dict(row.fields)!r}")
        check_mask(token_ids, mask_id, prompt)
        if len(token_ids) > max_length:
            num_cut += 1
            inner = tokenizer(prompt, add_special_tokens=False).input_ids
            token_ids = _shortened(token_ids, inner, mask_id, max_length)
        found.append(LabelledTokens(tuple(token_ids), numbers[row.response]))
    return found, num_cut


def mask_token_id(tokenizer: PreTrainedTokenizerBase, template: Template) -> int | None:
    """The token in whose place a masked language model answers; None if the template has no place for one.

    Raises:
        DataError: several places, or a tokenizer without such a token.
    """
    if not template.num_masks:
        return None
    if template.num_masks > 1:
        raise DataError(f"expected one {MASK} in a template, got {template.num_masks} in {template.text!r}")
    if tokenizer.mask_token_id is None:
        raise DataError(
            f"expected the tokenizer of a masked language model for {MASK} in the template, got one without "
            "a mask token; name such a model, or another template"
        )
    return int(tokenizer.mask_token_id)


def check_mask(token_ids: Sequence[int], mask_id: int | None, prompt: str) -> None:
    """Checks that a prompt has the mask token once, if it is to have one.

    Raises:
        DataError: another number: a row's text spells the token out.
    """
    if mask_id is not None and (count := list(token_ids).count(mask_id)) != 1:
        raise DataError(
            f"expected one mask token in a prompt, the template's, got {count} in {prompt[:80]!r}; take it "
            "out of the text"
        )


def _shortened(
    token_ids: Sequence[int], inner: Sequence[int], mask_id: int | None, max_length: int
) -> list[int]:
    """Tokens of a prompt, ``max_length`` at most: its beginning goes, and what follows the mask if it must.

    Args:
        token_ids: with the special tokens around them, which stay.
        inner: without those.
        mask_id: of the token that stays; None without one.
        max_length: at least one more than special tokens if there is a mask.

    Raises:
        DataError: no room for the mask.
    """
    num_special = len(token_ids) - len(inner)
    starts = range(num_special + 1)
    start = next((at for at in starts if list(token_ids[at : at + len(inner)]) == list(inner)), 0)
    room = max_length - num_special
    if mask_id is not None and room < 1:
        raise DataError(f"expected at least {num_special + 1} tokens a row (--max-length), got {max_length}")
    first = len(inner) - max(room, 0)
    if mask_id is not None:
        first = min(first, list(inner).index(mask_id))
    kept = inner[first : first + max(room, 0)]
    return [*token_ids[:start], *kept, *token_ids[start + len(inner) :]]


def collate_labelled(rows: Sequence[LabelledTokens], pad_id: int) -> LabelledBatch:
    """Right-padded rows.

    Raises:
        ValueError: no rows.
    """
    if not rows:
        raise ValueError("expected at least one row to make a batch of, got none")
    input_ids, attention_mask = padded([row.input_ids for row in rows], pad_id)
    return LabelledBatch(input_ids, attention_mask, torch.tensor([row.label for row in rows]))


@dataclass(frozen=True)
class Classifier:
    """How a model answers a batch.

    Attributes:
        num_labels: L.
        verbalizer: the labels' tokens of a language model; None for a model whose head has a logit a label.
        pad_id: what fills up rows, told to a head that looks for a row's last token; None leaves it as it is.
        mask_id: the token in whose place a masked language model answers; None: behind a row's last token.
    """

    num_labels: int
    verbalizer: Verbalizer | None = None
    pad_id: int | None = None
    mask_id: int | None = None

    @torch.no_grad()
    def logits(self, model: torch.nn.Module, batch: LabelledBatch) -> torch.Tensor:
        """The labels' logits in fp32, (B, L).

        Raises:
            ValueError: a head with another number of logits.
        """
        return self._logits(model, batch)

    def _logits(self, model: torch.nn.Module, batch: LabelledBatch) -> torch.Tensor:
        found = self._head(model, batch) if self.verbalizer is None else self._words(model, batch)
        if found.shape != (len(batch.labels), self.num_labels):
            raise ValueError(
                f"expected logits of {len(batch.labels)} rows and {self.num_labels} labels, "
                f"got {list(found.shape)} from {type(model).__name__}"
            )
        return found.float()

    def losses(self, model: torch.nn.Module, batch: LabelledBatch) -> torch.Tensor:
        """Each row's cross-entropy among the labels in nats: softmax in fp32, (B,) in fp64."""
        return cross_entropies(self.logits(model, batch), batch.labels)

    def paired_losses(self, model: torch.nn.Module, batch: LabelledBatch) -> torch.Tensor:
        """The mean of `losses` for each half of the batch run twice, for a paired storage mode: fp64 [2]."""
        tensors = (batch.input_ids, batch.attention_mask, batch.labels)
        doubled = LabelledBatch(*(torch.cat([tensor, tensor]) for tensor in tensors))
        return self.losses(model, doubled).view(2, -1).mean(dim=1)

    def loss(self, model: torch.nn.Module, batch: LabelledBatch) -> float:
        """The mean of `losses`, summed in fp64."""
        return float(self.losses(model, batch).mean())

    def mean_loss(self, model: torch.nn.Module, batch: LabelledBatch) -> torch.Tensor:
        """The mean of `losses`, for a backward pass: fp64, one element."""
        return cross_entropies(self._logits(model, batch), batch.labels).mean()

    def _words(self, model: torch.nn.Module, batch: LabelledBatch) -> torch.Tensor:
        assert self.verbalizer is not None
        asked: Any = batch.attention_mask.sum(dim=1) - 1  # `unique` has no annotations
        if self.mask_id is not None:
            asked = (batch.input_ids == self.mask_id).long().argmax(dim=1)
        columns, place = asked.unique(return_inverse=True)
        parameters = inspect.signature(model.forward).parameters
        options: dict[str, Any] = {"use_cache": False} if "use_cache" in parameters else {}
        keeps = "logits_to_keep" in parameters
        if keeps:
            options["logits_to_keep"] = columns
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, **options).logits
        rows = torch.arange(len(asked), device=asked.device)
        logits = logits[rows, place if keeps else asked]
        found: torch.Tensor = logits[:, list(self.verbalizer.token_ids)]
        return found

    def _head(self, model: torch.nn.Module, batch: LabelledBatch) -> torch.Tensor:
        config: Any = getattr(model, "config", None)
        if config is not None and self.pad_id is not None:
            config.pad_token_id = self.pad_id  # decoders look for the last token that is another one
        found: torch.Tensor = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        return found


def cross_entropies(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Each row's negative log-likelihood of its label: fp32 logits (B, L), result (B,) in fp64."""
    return torch.nn.functional.cross_entropy(logits, labels, reduction="none").double()


def score_rows(
    classifier: Classifier,
    model: torch.nn.Module,
    rows: Sequence[LabelledTokens],
    pad_id: int,
    *,
    batch_size: int = SCORED_BATCH,
    device: torch.device | str = "cpu",
    progress: Any = iter,
) -> torch.Tensor:
    """The labels' logits of every row in the rows' order, fp32 on the CPU; rows of like length share a batch.

    Args:
        classifier: how the model answers.
        model: as it stands.
        rows: at least one.
        pad_id: fills up shorter rows.
        batch_size: rows that run together.
        device: of the model.
        progress: wraps the batches, a bar, say.
    """
    order = sorted(range(len(rows)), key=lambda index: (len(rows[index].input_ids), index))
    starts = range(0, len(order), batch_size)
    logits = torch.empty(len(rows), classifier.num_labels)
    for start in progress(starts):
        chosen = order[start : start + batch_size]
        batch = collate_labelled([rows[index] for index in chosen], pad_id)
        logits[chosen] = classifier.logits(model, batch.to(device)).cpu()
    return logits


def area_under_curve(margins: Iterable[float], is_positive: Iterable[bool]) -> float | None:
    """Probability that a positive row has a larger margin than a negative one (ties count half); AUC.

    None if either kind is missing.
    """
    pairs = list(zip(margins, is_positive, strict=True))
    positive = sorted(margin for margin, is_one in pairs if is_one)
    negative = sorted(margin for margin, is_one in pairs if not is_one)
    if not positive or not negative:
        return None
    larger = sum(bisect_left(negative, margin) + bisect_right(negative, margin) for margin in positive)
    return larger / (2 * len(positive) * len(negative))
