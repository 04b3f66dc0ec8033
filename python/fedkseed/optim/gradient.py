"""The projected gradient: from the losses on both sides of the weights to the scalar that travels."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from fedkseed._checks import check_bound, check_eps


@dataclass(frozen=True)
class ProjectedGradient:
    """g = fp32((L+ - L-) / (2 eps)) from fp64 losses, or None where the direction is to be skipped.

    Skipped are directions whose losses or g are not finite, and those with |L+ - L-| above max_loss_gap
    (the rule of the official FedKSeed code, which calls it grad_clip). What is left is clipped to
    [-max_abs_g, max_abs_g].

    Attributes:
        eps: scale of the perturbation, rounded to fp32.
        max_abs_g: above 0, rounded down to fp32 so that it bounds g as sent; None for no bound.
        max_loss_gap: above 0; None for no bound.

    Raises:
        TypeError, ValueError: one of them is not such a number.
    """

    eps: float
    max_abs_g: float | None = None
    max_loss_gap: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "eps", check_eps(self.eps))
        if self.max_abs_g is not None:
            object.__setattr__(self, "max_abs_g", _rounded_down(check_bound("max_abs_g", self.max_abs_g)))
        if self.max_loss_gap is not None:
            object.__setattr__(self, "max_loss_gap", check_bound("max_loss_gap", self.max_loss_gap))

    def __call__(self, plus: float, minus: float) -> float | None:
        """g of the losses at w + eps z and at w - eps z."""
        with np.errstate(over="ignore", invalid="ignore"):
            gap = np.float64(plus) - np.float64(minus)
            g = float(np.float32(gap / (2 * self.eps)))
        if not math.isfinite(g) or (self.max_loss_gap is not None and abs(gap) > self.max_loss_gap):
            return None
        return g if self.max_abs_g is None else min(max(g, -self.max_abs_g), self.max_abs_g)


def _rounded_down(bound: float) -> float:
    nearest = np.float32(min(bound, float(np.finfo(np.float32).max)))
    # Compared as Python floats: NumPy would round the bound to fp32 first.
    return float(nearest if float(nearest) <= bound else np.nextafter(nearest, np.float32(0)))
