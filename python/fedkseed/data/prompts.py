"""Examples made into padded token batches whose labels cover the response only.

Shapes: B rows of a batch, T tokens of its longest row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, get_args

import torch

from fedkseed.data.federated import Row
from fedkseed.data.templates import Template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PromptStyle = Literal["chat", "alpaca", "plain"]

#: What a row that is too long loses: "prompt", the beginning of its prompt; "end", what stands at its end.
Truncate = Literal["prompt", "end"]

#: Label of a token that carries no loss (the value that torch's cross entropy ignores).
IGNORED = -100


class ExampleLike(Protocol):
    """What an example must have: three strings, ``input`` may be empty."""

    @property
    def instruction(self) -> str: ...
    @property
    def input(self) -> str: ...
    @property
    def output(self) -> str: ...


@dataclass(frozen=True)
class Encoded:
    """One example as tokens: the first ``num_prompt`` ones are the prompt, the rest the response."""

    input_ids: tuple[int, ...]
    num_prompt: int

    @property
    def num_response(self) -> int:
        """How many tokens the response has: 0 where all of it was cut off."""
        return len(self.input_ids) - self.num_prompt


@dataclass(frozen=True)
class Batch:
    """Right-padded rows: three int64 tensors of shape (B, T).

    ``attention_mask`` is 1 on tokens and 0 on padding; ``labels`` repeats ``input_ids`` on the response
    (end-of-text token included) and is `IGNORED` on the prompt and on padding.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor

    @property
    def has_response(self) -> bool:
        """Whether any row has a response token: without one there is no loss."""
        return bool((self.labels != IGNORED).any())

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        return Batch(self.input_ids.to(device), self.attention_mask.to(device), self.labels.to(device))


def format_prompt(
    tokenizer: PreTrainedTokenizerBase, instruction: str, input: str, style: PromptStyle
) -> str:
    """The text that the model continues (`Template.prompt` of the template of that name).

    Raises:
        ValueError: unknown style, or "chat" with a tokenizer that has no chat template.
    """
    if style not in get_args(PromptStyle):
        raise ValueError(f"expected a prompt style out of {list(get_args(PromptStyle))}, got {style!r}")
    return Template.named(style).prompt(tokenizer, {"instruction": instruction, "input": input})


def encode_prompt(tokenizer: PreTrainedTokenizerBase, example: ExampleLike, style: PromptStyle) -> list[int]:
    """Token ids of the prompt alone, as generation needs them."""
    text = format_prompt(tokenizer, example.instruction, example.input, style)
    return _prompt_ids(tokenizer, text, Template.named(style).adds_special_tokens)


def encode_example(
    tokenizer: PreTrainedTokenizerBase,
    example: ExampleLike,
    style: PromptStyle = "chat",
    max_length: int = 1024,
) -> Encoded:
    """Tokens of an example, as `encode_text` makes them.

    Raises:
        ValueError: see `encode_text` and `format_prompt`.
    """
    prompt = format_prompt(tokenizer, example.instruction, example.input, style)
    special = Template.named(style).adds_special_tokens
    return encode_text(tokenizer, prompt, example.output, adds_special_tokens=special, max_length=max_length)


def encode_text(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    response: str,
    *,
    adds_special_tokens: bool,
    max_length: int,
) -> Encoded:
    """Tokens of prompt, response and end of text; past ``max_length`` tokens the prompt loses its beginning.

    Raises:
        ValueError: the response with one prompt token before it does not fit into ``max_length``, or the
            tokenizer has no end-of-text token.
    """
    answer = _response_ids(tokenizer, response)
    question = _prompt_ids(tokenizer, prompt, adds_special_tokens)
    if len(answer) >= max_length:
        raise ValueError(
            f"expected a response of at most {max_length - 2} tokens (max_length={max_length}), "
            f"got {len(answer) - 1}; shorten the response or raise max_length"
        )
    return _fitted(question, answer, max_length)


@dataclass(frozen=True)
class Cuts:
    """What became of rows that do not fit into the length.

    Attributes:
        shortened: rows that lost what the cut takes: their prompt's beginning, or what stands at their end.
        dropped: rows left out, since their response alone does not fit.
        emptied: of those shortened, rows whose whole response is gone, but that stay.
    """

    shortened: int = 0
    dropped: int = 0
    emptied: int = 0


def encode_rows(
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    template: Template,
    max_length: int,
    truncate: Truncate = "prompt",
) -> tuple[list[Encoded], Cuts]:
    """Tokens of rows, and how many were cut.

    With truncate "prompt" each is as `encode_text` makes it. With "end" it is as in the authors' code
    (github.com/zhenqincn/FedKSeed at commit ebf8216): the first ``max_length`` tokens of prompt, response and
    end of text as one text, of which the response begins after as many tokens as the prompt alone has. A row
    whose whole response is cut off stays.

    Raises:
        ValueError: the tokenizer has no end-of-text token, or see `Template.prompt`.
    """
    encoded: list[Encoded] = []
    shortened = 0
    for row in rows:
        if truncate == "end":
            question, whole = _whole_ids(tokenizer, template, row)
            encoded.append(Encoded(tuple(whole[:max_length]), min(len(question), len(whole), max_length)))
            shortened += len(whole) > max_length
            continue
        answer = _response_ids(tokenizer, row.response)
        if len(answer) >= max_length:
            continue
        text = template.prompt(tokenizer, row.fields)
        question = _prompt_ids(tokenizer, text, template.adds_special_tokens)
        encoded.append(_fitted(question, answer, max_length))
        shortened += encoded[-1].num_prompt < len(question)
    emptied = sum(not row.num_response for row in encoded)
    return encoded, Cuts(shortened, len(rows) - len(encoded), emptied)


def _whole_ids(
    tokenizer: PreTrainedTokenizerBase, template: Template, row: Row
) -> tuple[list[int], list[int]]:
    """The prompt alone, and the prompt with response and end of text as one text."""
    text = template.prompt(tokenizer, row.fields)
    _check_end_of_text(tokenizer)
    end = str(tokenizer.eos_token)
    question, whole = (
        _prompt_ids(tokenizer, part, template.adds_special_tokens)
        for part in (text, text + row.response + end)
    )
    return question, whole


def _prompt_ids(tokenizer: PreTrainedTokenizerBase, text: str, adds_special_tokens: bool) -> list[int]:
    # A chat template writes its own special tokens; plain text gets the tokenizer's (a leading BOS, say).
    return list(tokenizer(text, add_special_tokens=adds_special_tokens).input_ids)


def _response_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    _check_end_of_text(tokenizer)
    return [*tokenizer(text, add_special_tokens=False).input_ids, int(tokenizer.eos_token_id)]


def _check_end_of_text(tokenizer: PreTrainedTokenizerBase) -> None:
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "expected a tokenizer with an end-of-text token (eos_token), got one without; set it"
        )


def _fitted(prompt: list[int], response: list[int], max_length: int) -> Encoded:
    prompt = prompt[len(response) - max_length :]
    return Encoded((*prompt, *response), len(prompt))


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id to pad with: the tokenizer's own, else its end-of-text token (masked out: any id would do)."""
    for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return int(token_id)
    raise ValueError(
        "expected a tokenizer with a padding or end-of-text token, got one with neither; set one"
    )


def padded(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids right-padded to one int64 (B, T) tensor, and the mask that is 1 on them and 0 on padding.

    Args:
        rows: at least one.
        pad_id: fills up shorter rows.
    """
    shape = (len(rows), max(map(len, rows)))
    input_ids = torch.full(shape, pad_id, dtype=torch.int64)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    for index, row in enumerate(rows):
        input_ids[index, : len(row)] = torch.tensor(row, dtype=torch.int64)
        attention_mask[index, : len(row)] = 1
    return input_ids, attention_mask


def collate(encoded: Sequence[Encoded], pad_id: int) -> Batch:
    """Right-pad examples to one (B, T) batch.

    Raises:
        ValueError: no examples.
    """
    if not encoded:
        raise ValueError("expected at least one example to make a batch of, got none")
    input_ids, attention_mask = padded([row.input_ids for row in encoded], pad_id)
    labels = torch.full_like(input_ids, IGNORED)
    for index, row in enumerate(encoded):
        response = slice(row.num_prompt, len(row.input_ids))
        labels[index, response] = input_ids[index, response]
    return Batch(input_ids, attention_mask, labels)


def batch_at(encoded: Sequence[Encoded], indices: Sequence[int], pad_id: int) -> Batch:
    """The batch of the rows at ``indices`` (repeats allowed): the caller owns every random choice.

    Raises:
        IndexError: an index outside [0, len(encoded)).
    """
    for index in indices:
        if not 0 <= index < len(encoded):
            raise IndexError(f"expected row indices in [0, {len(encoded)}), got {index}")
    return collate([encoded[index] for index in indices], pad_id)


def iterate_batches(encoded: Sequence[Encoded], batch_size: int, pad_id: int) -> Iterator[Batch]:
    """Every row once, for evaluation: shortest rows first, so that little is padding.

    Raises:
        ValueError: ``batch_size`` below 1.
    """
    if batch_size < 1:
        raise ValueError(f"expected a batch size of at least 1, got {batch_size}")
    order = sorted(range(len(encoded)), key=lambda index: (len(encoded[index].input_ids), index))
    for start in range(0, len(order), batch_size):
        yield batch_at(encoded, order[start : start + batch_size], pad_id)
