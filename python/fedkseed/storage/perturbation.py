"""w +- eps z beside the stored weights: of whole tensors, of both sides, of rows of an embedding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import fedkseed_kernels


@dataclass(eq=False)
class Weight:
    """A parameter as a perturbed forward pass sees it.

    Attributes:
        name: in the model.
        parameter: of the model.
        stored: its values, which stay as they are.
        stream: of its noise; None if it is not perturbed, only converted.
        dtype: in which the forward pass gets it.
        residual: int16, what the stored values of 16 bits leave out (contract, section 6.5); or None.
    """

    name: str
    parameter: nn.Parameter
    stored: Tensor
    stream: int | None
    dtype: torch.dtype
    residual: Tensor | None = None

    @property
    def is_widened(self) -> bool:
        """Whether the forward pass gets it in another dtype than it is stored in."""
        return self.dtype != self.stored.dtype


@dataclass(frozen=True)
class Perturbation:
    """+-eps z(seed), and how the sum with the weights is rounded.

    Attributes:
        seed: of the noise.
        eps: an fp32 value.
        family: of the noise.
        rounding_seed: of stochastic rounding, the same for both sides; None rounds to nearest.
    """

    seed: int
    eps: float
    family: str
    rounding_seed: int | None = None

    def write(self, weights: Sequence[Weight], out: Sequence[Tensor], sign: int) -> None:
        """out[i] = w_i + sign eps z, of a widened weight not rounded to 16 bits: one launch.

        Args:
            out: of each weight's shape and ``dtype``.
            sign: 1 or -1.
        """
        outs = self._perturbed(weights, out)
        if outs:
            fedkseed_kernels.seed_axpy(
                seeds=[self.seed], coeffs=[sign * self.eps], out=outs, **self._options(weights)
            )

    def write_both(self, weights: Sequence[Weight], plus: Sequence[Tensor], minus: Sequence[Tensor]) -> None:
        """plus[i] = w_i + eps z and minus[i] = w_i - eps z, the noise drawn once."""
        outs, outs_minus = self._perturbed(weights, plus), self._perturbed(weights, minus)
        if outs:
            fedkseed_kernels.seed_axpy_pair(
                seeds=[self.seed],
                coeffs=[self.eps],
                out_plus=outs,
                out_minus=outs_minus,
                **self._options(weights),
            )

    def rows(self, weight: Weight, ids: Tensor, sign: int) -> Tensor:
        """Rows ids of w + sign eps z, of shape [*ids.shape, *w.shape[1:]]; no other row is drawn."""
        flat = ids.reshape(-1).long()
        shape = (*ids.shape, *weight.stored.shape[1:])
        if weight.stream is None:
            return weight.stored[flat].to(weight.dtype).view(shape)
        options = self._options([weight])
        if weight.is_widened:
            # The noise of these rows, to which the widened rows are added: the same sum, rounded once.
            zero = torch.tensor(-0.0, dtype=weight.dtype, device=weight.stored.device)
            options |= {"tensors": [zero.expand(weight.stored.shape)], "residuals": None}
        (found,) = fedkseed_kernels.seed_axpy(
            seeds=[self.seed], coeffs=[sign * self.eps], rows=flat, **options
        )
        if weight.is_widened:
            found += _widened(weight, flat)
        return found.view(shape)

    def _perturbed(self, weights: Sequence[Weight], out: Sequence[Tensor]) -> list[Tensor]:
        """The outputs of the weights that are perturbed; the others are written here."""
        for weight, tensor in zip(weights, out, strict=True):
            if weight.stream is None:
                tensor.copy_(weight.stored)
        return [tensor for weight, tensor in zip(weights, out, strict=True) if weight.stream is not None]

    def _options(self, weights: Sequence[Weight]) -> dict[str, Any]:
        """What the launches of perturbed weights share."""
        perturbed = [weight for weight in weights if weight.stream is not None]
        return {
            "tensors": [weight.stored for weight in perturbed],
            "streams": [weight.stream for weight in perturbed],
            "residuals": [weight.residual for weight in perturbed],
            "family": self.family,
            "rounding": "nearest" if self.rounding_seed is None else "stochastic",
            "rounding_seed": self.rounding_seed,
        }


def _widened(weight: Weight, flat: Tensor) -> Tensor:
    """Some rows of a weight as its forward pass gets them, without noise."""
    stored = weight.stored[flat]
    residual = None if weight.residual is None else weight.residual[flat]
    out = torch.empty(stored.shape, dtype=weight.dtype, device=stored.device)
    fedkseed_kernels.seed_axpy([stored], [], [], residuals=[residual], out=[out])
    return out
