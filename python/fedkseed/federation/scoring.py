"""The scores that an evaluation finds: in which mode the model is then, and what may come back."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from fedkseed.model.modes import Modes

#: Named scores of a model after a round, from (model, round).
Evaluate = Callable[[nn.Module, int], Mapping[str, float]]


def scores_of(evaluate: Evaluate, model: nn.Module, round: int) -> dict[str, float | None]:
    """What ``evaluate`` finds, called without gradients; None for values that are not finite.

    The modes of the modules (train, eval) are put back afterwards.

    Raises:
        TypeError: what came back is no mapping of numbers by name.
    """
    modes = Modes(model)
    try:
        with torch.no_grad():
            found: object = evaluate(model, round)
    finally:
        modes.restore(model)  # or steps that come after it go on in the evaluation's
    if not isinstance(found, Mapping):
        raise TypeError(
            f"expected evaluate to return scores by name, got a {type(found).__name__}; return a dict, "
            "an empty one where there are none"
        )
    return {name: _number(name, value) for name, value in found.items()}


def _number(name: object, value: Any) -> float | None:
    if value is None:
        return None
    try:
        if isinstance(value, (str, bytes)):
            raise TypeError("text")
        number = float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise TypeError(
            f"expected evaluate to return numbers by name, got a {type(value).__name__} as {name!r}; return "
            "a mean, for instance, or None to leave the score out"
        ) from error
    return number if math.isfinite(number) else None
