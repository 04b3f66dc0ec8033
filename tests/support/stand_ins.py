"""A stand-in for the wrapper that Lightning puts around an optimizer, without the loop that it belongs to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class LightningOptimizer:
    """What Lightning 2.6 hands out by ``self.optimizers()``: it borrows the class and all attributes.

    Its ``step`` always passes a closure, and what is set on it stays on it.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        borrowed = (type(self), type(optimizer))
        self.__class__ = type("Lightning" + type(optimizer).__name__, borrowed, {})

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        return self.optimizer.step(closure or (lambda: None))  # type: ignore[arg-type, return-value]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.optimizer, name)
