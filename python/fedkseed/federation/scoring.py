"""The scores that an evaluation finds: in which mode the model is then, and what may come back."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch
from torch import nn

from fedkseed.model.modes import Modes
from fedkseed.model.randomness import active_dropout
from fedkseed.optim.notices import warn_user

#: Named scores of a model after a round, from (model, round).
Evaluate = Callable[[nn.Module, int], Mapping[str, float]]

#: Models whose first evaluation was looked at.
_looked_at: WeakSet[nn.Module] = WeakSet()


def scores_of(evaluate: Evaluate, model: nn.Module, round: int) -> dict[str, float | None]:
    """What ``evaluate`` finds, called without gradients; None for values that are not finite.

    The modes of the modules (train, eval) are put back afterwards. Where dropout is at work in the first
    evaluation of a model, a warning says so, as it does in an optimizer's first step.

    Raises:
        TypeError: what came back is no mapping of numbers by name.
    """
    modes = Modes(model)
    try:
        with torch.no_grad(), _dropout_told(model):
            found: object = evaluate(model, round)
    finally:
        modes.restore(model)  # or steps that come after it go on in the evaluation's
    if not isinstance(found, Mapping):
        raise TypeError(
            f"expected evaluate to return scores by name, got a {type(found).__name__}; return a dict, "
            "an empty one where there are none"
        )
    return {name: _number(name, value) for name, value in found.items()}


@contextmanager
def _dropout_told(model: nn.Module) -> Iterator[None]:
    """A context that warns at its end if dropout ran inside, once for a model.

    Seen by hooks, as ``evaluate`` may choose eval mode itself and put the old one back.
    """
    active = [] if model in _looked_at else active_dropout(model)
    _looked_at.add(model)
    ran: list[str] = []
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, _, told=f"{name} (p={p})": ran.append(told) if module.training else None
        )
        for name, p in active
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    if ran:
        warn_user(
            f"evaluate runs the model in train mode with dropout: {ran[0]}, {len(set(ran))} in all. Its "
            "scores are those of a thinned model and differ from call to call; call model.eval() there first "
            "(the mode is put back afterwards)"
        )


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
