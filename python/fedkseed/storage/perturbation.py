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
    """

    name: str
    parameter: nn.Parameter
    stored: Tensor
    stream: int | None
    dtype: torch.dtype

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
        """out[i] = w_i + sign eps z: one launch; a widened weight is widened first, then perturbed exactly.

        Args:
            out: of each weight's shape and ``dtype``.
            sign: 1 or -1.
        """
        inputs, outs, streams = self._operands(weights, out)
        if inputs:
            fedkseed_kernels.seed_axpy(
                inputs, [self.seed], [sign * self.eps], streams=streams, out=outs, **self._options()
            )

    def write_both(self, weights: Sequence[Weight], plus: Sequence[Tensor], minus: Sequence[Tensor]) -> None:
        """plus[i] = w_i + eps z and minus[i] = w_i - eps z, the noise drawn once."""
        inputs, outs, streams = self._operands(weights, plus)
        outs_minus = []
        for weight, tensor in zip(weights, minus, strict=True):
            if weight.stream is None:
                tensor.copy_(weight.stored)
            else:
                outs_minus.append(tensor)
        if inputs:
            fedkseed_kernels.seed_axpy_pair(
                inputs,
                [self.seed],
                [self.eps],
                streams=streams,
                out_plus=outs,
                out_minus=outs_minus,
                **self._options(),
            )

    def rows(self, weight: Weight, ids: Tensor, sign: int) -> Tensor:
        """Rows ids of w + sign eps z, of shape [*ids.shape, *w.shape[1:]]; no other row is drawn."""
        flat = ids.reshape(-1).long()
        shape = (*ids.shape, *weight.stored.shape[1:])
        if weight.stream is None:
            return weight.stored[flat].to(weight.dtype).view(shape)
        whole, options = weight.stored, self._options()
        if weight.is_widened:
            # Adding z to a row that is widened afterwards gives the same bits as the other order.
            whole = torch.tensor(-0.0, dtype=weight.dtype, device=whole.device).expand(whole.shape)
        (found,) = fedkseed_kernels.seed_axpy(
            [whole], [self.seed], [sign * self.eps], streams=[weight.stream], rows=flat, **options
        )
        if weight.is_widened:
            found += weight.stored[flat]
        return found.view(shape)

    def whole(self, weight: Weight, sign: int) -> Tensor:
        """w + sign eps z in memory of its own."""
        out = torch.empty(weight.stored.shape, dtype=weight.dtype, device=weight.stored.device)
        self.write([weight], [out], sign)
        return out

    def _operands(
        self, weights: Sequence[Weight], out: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor], list[int]]:
        """Inputs, outputs and streams of the launch; what has to be widened or is not perturbed is copied."""
        inputs, outs, streams = [], [], []
        for weight, tensor in zip(weights, out, strict=True):
            copied = weight.is_widened or weight.stream is None
            if copied:
                tensor.copy_(weight.stored)
            if weight.stream is not None:
                inputs.append(tensor if copied else weight.stored)
                outs.append(tensor)
                streams.append(weight.stream)
        return inputs, outs, streams

    def _options(self) -> dict[str, Any]:
        rounding = "nearest" if self.rounding_seed is None else "stochastic"
        return {"family": self.family, "rounding": rounding, "rounding_seed": self.rounding_seed}
