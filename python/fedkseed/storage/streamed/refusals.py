"""What streamed weights cannot serve: errors of one type, by which storage="auto" knows them."""

from __future__ import annotations


class NotStreamableError(Exception):
    """A model that the streamed mode cannot serve, and `fedkseed.Inplace` may; says why and what to do."""


class NotStreamableModelError(NotStreamableError, TypeError):
    """No model, or modules that would not see the perturbed weights; raised at construction."""


class NotStreamableWeightError(NotStreamableError, ValueError):
    """Weights whose places in the model cannot be perturbed unit by unit; raised at construction."""


class NotStreamableForwardError(NotStreamableError, RuntimeError):
    """A forward pass that reads weights outside of their units, or in another dtype; raised as it runs."""
