"""How good a model is on held-out rows: response loss, Rouge-L, exact match, and the majority answer beside.

Shapes: B rows of a batch, T tokens of its longest row, R response tokens of the batch.
"""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from fedkseed._means import mean
from fedkseed.data.federated import ClientRows
from fedkseed.data.paper_rouge import paper_rouge_l
from fedkseed.data.prompts import IGNORED, Batch, pad_token_id

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@torch.no_grad()
def response_nll(model: torch.nn.Module, batch: Batch, *, share_prefix: bool = False) -> tuple[float, int]:
    """Summed negative log-likelihood (nats) of a batch's response tokens, and R, their number.

    Logits are computed only for positions where some row has a response token, if the model can
    (``logits_to_keep``). The softmax is taken in fp32, the sum over tokens in fp64.

    Args:
        model: a causal language model of transformers' calling convention.
        batch: right-padded rows; moved to the model's device.
        share_prefix: run the prompt tokens that all rows begin with once instead of B times, through the
            model's key-value cache: the same loss up to rounding, for less time on rows of one task.

    Raises:
        ValueError: no row of the batch has a response token, or ``share_prefix`` with a model whose cache
            cannot be repeated for several rows.
    """
    nll, _ = _token_nll(model, batch, share_prefix)
    return float(nll.double().sum()), int(nll.numel())


def mean_response_loss(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Mean negative log-likelihood of a batch's response tokens, for a backward pass: fp64, one element.

    Arguments and errors as `response_nll`, whose sum over its number of tokens it is. No prefix is shared:
    dropout is drawn for each row.
    """
    nll, _ = _token_nll(model, batch, share_prefix=False)
    return nll.double().mean()


@torch.no_grad()
def paired_response_losses(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Mean loss in nats of a batch's response tokens for each half of the batch run twice: fp64 [2].

    For a paired storage mode (`fedkseed.storage`): rows 0 to B - 1 meet the plus side, the same again the
    minus side. Arguments and errors as `response_nll`.
    """
    tensors = (batch.input_ids, batch.attention_mask, batch.labels)
    nll, rows = _token_nll(model, Batch(*(torch.cat([tensor, tensor]) for tensor in tensors)), False)
    is_plus = rows < len(batch.input_ids)
    return torch.stack([nll[is_plus].double().mean(), nll[~is_plus].double().mean()])


def _token_nll(model: torch.nn.Module, batch: Batch, share_prefix: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Negative log-likelihood of each response token in fp32, and the row that it is of: both (R,)."""
    batch = batch.to(next(model.parameters()).device)
    targets = batch.labels[:, 1:]  # the token at t is predicted at t - 1
    columns = (targets != IGNORED).any(dim=0).nonzero().flatten()
    if not len(columns):
        raise ValueError(
            "expected at least one response token in the batch, got none: every label is ignored"
        )
    options: dict[str, Any] = {}
    parameters = inspect.signature(model.forward).parameters
    start = _num_shared(batch, int(columns[0])) if share_prefix else 0
    if start:
        # The name since transformers 5.24; 5.40 takes the older one away.
        name = "cache" if "cache" in parameters else "past_key_values"
        options[name] = _repeated_prefix(model, name, batch.input_ids[:1, :start], len(batch.input_ids))
    if "use_cache" in parameters:
        options["use_cache"] = start > 0
    keeps = "logits_to_keep" in parameters
    if keeps:
        options["logits_to_keep"] = columns - start
    logits = model(
        input_ids=batch.input_ids[:, start:], attention_mask=batch.attention_mask, **options
    ).logits
    targets = targets[:, columns]
    logits = logits if keeps else logits[:, columns - start]
    chosen = targets != IGNORED
    nll = torch.nn.functional.cross_entropy(logits[chosen].float(), targets[chosen], reduction="none")
    return nll, chosen.nonzero()[:, 0]


def response_loss(model: torch.nn.Module, batches: Iterable[Batch], *, share_prefix: bool = False) -> float:
    """Mean negative log-likelihood in nats over all response tokens of all batches, summed in fp64.

    Raises:
        ValueError: no batches, or see `response_nll`.
    """
    total, count = 0.0, 0
    for batch in batches:
        nll, num_tokens = response_nll(model, batch, share_prefix=share_prefix)
        total += nll
        count += num_tokens
    if count == 0:
        raise ValueError("expected at least one batch to evaluate, got none")
    return total / count


@torch.no_grad()
def response_row_losses(
    model: torch.nn.Module, batches: Iterable[Batch], *, share_prefix: bool = False
) -> list[float]:
    """Mean negative log-likelihood in nats of each row's response tokens, in the order of the batches.

    The mean is taken in fp64. A row without a response token, in a batch where another has one, is left out.

    Raises:
        ValueError: see `response_nll`.
    """
    found: list[float] = []
    for batch in batches:
        nll, rows = _token_nll(model, batch, share_prefix)
        nll, start = nll.double().cpu(), 0
        for count in rows.bincount().tolist():
            if count:
                found.append(float(nll[start : start + count].mean()))
            start += count
    return found


def _num_shared(batch: Batch, limit: int) -> int:
    """How many tokens all of several rows begin with, at most ``limit``; 0 for a single row."""
    if len(batch.input_ids) == 1:
        return 0
    same = (batch.input_ids == batch.input_ids[:1]).all(dim=0) & batch.attention_mask.bool().all(dim=0)
    return min(limit, int(same.long().cumprod(dim=0).sum()))


def _repeated_prefix(model: torch.nn.Module, name: str, prefix: torch.Tensor, num_rows: int) -> Any:
    """The key-value cache (``name``) after ``prefix`` (1, number of tokens), for ``num_rows`` rows."""
    cache: Any = getattr(model(input_ids=prefix, use_cache=True), name, None)
    if not hasattr(cache, "batch_repeat_interleave"):
        raise ValueError(
            f"share_prefix: expected a model with a cache that can be repeated, got {type(cache).__name__} "
            f"from {type(model).__name__}; use share_prefix=False"
        )
    cache.batch_repeat_interleave(num_rows)
    return cache


@torch.no_grad()
def generate_greedy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int = 16,
    progress: bool = False,
    strip: bool = True,
) -> list[str]:
    """The most likely continuation, token by token, of each prompt (token ids), in the order of the prompts.

    Special tokens are removed, and with ``strip`` white space around a text. Prompts are padded on the left.

    Raises:
        ValueError: an empty prompt, or a count below 1.
    """
    for name, count in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if count < 1:
            raise ValueError(f"expected {name} of at least 1, got {count}")
    if any(len(prompt) == 0 for prompt in prompts):
        raise ValueError("expected prompts of at least one token, got an empty one")
    pad_id = pad_token_id(tokenizer)
    generate: Any = model.generate  # mixed in by transformers, unknown to its annotations
    device = next(model.parameters()).device
    order = sorted(range(len(prompts)), key=lambda index: (len(prompts[index]), index))
    texts = [""] * len(prompts)
    starts = range(0, len(order), batch_size)
    for start in tqdm(starts, desc="generating", unit="batch", leave=False, disable=not progress):
        chosen = order[start : start + batch_size]
        width = len(prompts[chosen[-1]])
        input_ids = torch.full((len(chosen), width), pad_id, dtype=torch.int64)
        attention_mask = torch.zeros_like(input_ids)
        for row, index in enumerate(chosen):
            input_ids[row, width - len(prompts[index]) :] = torch.tensor(prompts[index], dtype=torch.int64)
            attention_mask[row, width - len(prompts[index]) :] = 1
        generated = generate(
            input_ids.to(device),
            attention_mask=attention_mask.to(device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            pad_token_id=pad_id,
        )
        for index, tokens in zip(chosen, generated[:, width:], strict=True):
            text = str(tokenizer.decode(tokens, skip_special_tokens=True))
            texts[index] = text.strip() if strip else text
    return texts


def rouge_l(prediction: str, reference: str) -> float:
    """Rouge-L F-measure in [0, 1]: harmonic mean of the longest common subsequence's shares of both.

    Words are lower-cased runs of a-z and 0-9, as in the reference scorer; if a side has none, equal texts
    score 1 and others 0.
    """
    left, right = _words(prediction), _words(reference)
    if not left or not right:
        return float(prediction.strip() == reference.strip())
    lengths = [0] * (len(right) + 1)
    for word in left:
        diagonal = 0
        for column, other in enumerate(right, 1):
            above = lengths[column]
            lengths[column] = diagonal + 1 if word == other else max(above, lengths[column - 1])
            diagonal = above
    common = lengths[-1]
    return 2 * common / (len(left) + len(right))


def exact_match(prediction: str, reference: str) -> float:
    """1.0 if the texts agree but for white space around them, else 0.0."""
    return float(prediction.strip() == reference.strip())


@dataclass(frozen=True)
class MajorityScore:
    """A client's most frequent training answer and its mean scores on the client's held-out rows.

    ``paper_rouge`` is that of `paper_rouge_l`, None if it was not asked for.
    """

    client: str
    answer: str
    rouge_l: float
    exact_match: float
    paper_rouge: float | None = None


def majority_answer_scores(
    clients: Sequence[ClientRows], num_rows: int | None = None, *, with_paper_rouge: bool = False
) -> list[MajorityScore]:
    """What giving each client's most frequent training answer scores (of equally frequent ones: the first).

    It has no loss: it is an answer, not a distribution. A client without held-out rows has no score.

    Args:
        clients: those that train.
        num_rows: held-out rows of each that are looked at; None: all.
        with_paper_rouge: also by `paper_rouge_l`.

    Raises:
        MissingExtraError: as `paper_rouge_l`.
    """
    scores = []
    for client in clients:
        asked = client.held_out[:num_rows]
        if not asked:
            continue
        answer = Counter(row.response for row in client.train).most_common(1)[0][0]
        scores.append(
            MajorityScore(
                client=client.name,
                answer=answer,
                rouge_l=mean(rouge_l(answer, row.response) for row in asked),
                exact_match=mean(exact_match(answer, row.response) for row in asked),
                paper_rouge=mean(paper_rouge_l(answer, row.response) for row in asked)
                if with_paper_rouge
                else None,
            )
        )
    return scores


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())
