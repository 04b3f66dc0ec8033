"""Both sides of a step in one forward pass: a batch twice, and a loss for each half.

For models of transformers' calling convention. A paired storage mode (`fedkseed.storage`) runs the first
half of every batch on w + eps z and the second on w - eps z, so that the noise is drawn once for both:

    optimizer = ZOSGD(model, lr, storage=Streamed(paired=True))
    optimizer.step(lambda: paired_losses(model, batch))

Shapes: B rows of a batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

#: How far a loss put together from its halves may be from the model's own, in units of its dtype's epsilon.
_ROUNDING = 16


def paired_losses(model: nn.Module, batch: Mapping[str, Any]) -> torch.Tensor:
    """The loss of each half of a batch that is run twice in one forward pass: (plus, minus).

    Each entry is what ``model(**batch).loss`` is on the weights that its half meets: the model's own
    ``loss_function`` is called for each half, with what the model hands to it. Outside of a paired step both
    halves meet the same weights. Some models of transformers do without that function (T5, BART, BERT):
    theirs is the mean cross-entropy of logits and labels in the logits' dtype, -100 ignored, and it is
    checked that it is.

    The model's cache is left off. Nothing of the batch changes.

    Args:
        model: takes the batch as keywords and returns an object with ``loss`` and ``logits``; it may be
            wrapped, as long as a module within has the ``loss_function``.
        batch: with "labels"; every tensor of one dimension or more has B rows. Other values, and tensors
            without dimensions (``num_items_in_batch``), are handed over as they are.

    Returns:
        [2], in the dtype and on the device of the model's loss.

    Raises:
        TypeError: a batch that is no mapping; an entry that holds rows but is no tensor.
        ValueError: no labels, a tensor with another number of rows, a model that returns no logits or whose
            loss cannot be split in halves: one with terms beside the ``loss_function`` (a router's balance)
            or with another formula.
    """
    inputs = doubled(batch)
    if "labels" not in inputs:
        raise ValueError(f"expected a batch with labels, got {', '.join(inputs)}; the loss needs them")
    owner = next((module for module in model.modules() if hasattr(type(module), "loss_function")), None)
    if "use_cache" in inspect.signature((owner or model).forward).parameters:
        inputs["use_cache"] = False
    with _loss_of_halves(owner, 2 * _num_rows(batch)) as losses:
        output = model(**inputs)
    logits, loss = getattr(output, "logits", None), getattr(output, "loss", None)
    name = type(model).__name__
    if not isinstance(logits, torch.Tensor) or not isinstance(loss, torch.Tensor):
        raise ValueError(
            f"expected a model that returns loss and logits, got {type(output).__name__} from {name}; "
            "take the class with a head, and return_dict=True"
        )
    if not losses:
        return _mean_cross_entropies(name, logits, inputs["labels"], loss)
    if len(losses) > 1 or not torch.equal(loss.nan_to_num(), losses[0].nan_to_num()):
        raise ValueError(
            f"expected the loss of {name} to be what its loss_function returns, got more terms (such as a "
            "router's balance), which cannot be split in halves; switch them off"
        )
    return losses[0]


def doubled(batch: Mapping[str, Any]) -> dict[str, Any]:
    """A batch whose rows all stand twice: rows 0 to B - 1, and the same again as rows B to 2 B - 1.

    Raises:
        TypeError, ValueError: as `paired_losses`.
    """
    _num_rows(batch)
    return {
        key: torch.cat([value, value]) if isinstance(value, torch.Tensor) and value.dim() else value
        for key, value in batch.items()
    }


def _num_rows(batch: Mapping[str, Any]) -> int:
    """B, of a batch that can be doubled."""
    if not isinstance(batch, Mapping):
        raise TypeError(f"expected a batch as a mapping of names to tensors, got {type(batch).__name__}")
    rows = {}
    for key, value in batch.items():
        if isinstance(value, torch.Tensor):
            if value.dim():
                rows[key] = len(value)
        elif not (value is None or isinstance(value, (bool, int, float, str))):
            raise TypeError(
                f"expected tensors with a row for each of the batch, got {key} of {type(value).__name__}; "
                'with a tokenizer pass return_tensors="pt"'
            )
    if len(set(rows.values())) != 1:
        got = ", ".join(f"{key} with {count}" for key, count in rows.items()) or "no tensors"
        raise ValueError(f"expected tensors with the same number of rows in dimension 0, got {got}")
    return next(iter(rows.values()))


@contextmanager
def _loss_of_halves(owner: Any, num_rows: int) -> Iterator[list[torch.Tensor]]:
    """Meanwhile the owner's loss function, if any, returns [2], a loss for each half; gives what it did."""
    losses: list[torch.Tensor] = []
    if owner is None:
        yield losses
        return
    original = owner.loss_function

    def half(value: Any, index: int) -> Any:
        if not isinstance(value, torch.Tensor) or not value.dim():
            return value
        if len(value) != num_rows:
            raise ValueError(
                f"expected the loss function's tensors to have {num_rows} rows, got shape "
                f"{tuple(value.shape)}; the loss of {type(owner).__name__} cannot be split in halves"
            )
        return value.chunk(2)[index]

    def loss_function(*args: Any, **options: Any) -> torch.Tensor:
        halves = [
            original(*(half(value, i) for value in args), **{key: half(v, i) for key, v in options.items()})
            for i in range(2)
        ]
        losses.append(torch.stack(halves))
        return losses[-1].clone()  # some models add to it in place

    owner.loss_function = loss_function
    try:
        yield losses
    finally:
        owner.loss_function = original


def _mean_cross_entropies(
    name: str, logits: torch.Tensor, labels: torch.Tensor, loss: torch.Tensor
) -> torch.Tensor:
    """Cross entropy of each half, logits and labels at the same position; ``loss`` must be their mean."""
    labels = labels.to(logits.device)
    losses = torch.stack(
        [
            nn.functional.cross_entropy(half.flatten(0, -2), targets.flatten())
            for half, targets in zip(logits.chunk(2), labels.chunk(2), strict=True)
        ]
    )
    bound = _ROUNDING * torch.finfo(loss.dtype).eps * loss.detach().abs()
    if (
        loss.dim() or (losses.detach().mean() - loss.detach()).abs() > bound
    ):  # a NaN is the optimizer's to skip
        raise ValueError(
            f"expected the loss of {name} to be the cross-entropy of logits and labels, got "
            f"{losses.tolist()} for the halves of {loss.tolist()}; write a closure that returns both losses"
        )
    return losses
