"""w +- eps z beside the stored weights: of whole tensors, of both sides, of rows of an embedding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import fedkseed_kernels

# What is in between while a tensor is widened stays small beside it: so many pieces at most, none smaller
# than this many elements.
_NUM_PIECES, _SMALLEST_PIECE = 128, 1 << 16


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

    def write_value(self, out: Tensor) -> None:
        """out = the weight without noise, in ``dtype``; contiguous."""
        if self.residual is None:
            out.copy_(self.stored)
        else:
            write_compensated(self.stored, self.residual, out)


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
        inputs, outs, streams, residuals = self._operands(weights, out)
        if inputs:
            fedkseed_kernels.seed_axpy(
                inputs,
                [self.seed],
                [sign * self.eps],
                streams=streams,
                residuals=residuals,
                out=outs,
                **self._options(),
            )

    def write_both(self, weights: Sequence[Weight], plus: Sequence[Tensor], minus: Sequence[Tensor]) -> None:
        """plus[i] = w_i + eps z and minus[i] = w_i - eps z, the noise drawn once."""
        inputs, outs, streams, residuals = self._operands(weights, plus)
        outs_minus = []
        for weight, tensor in zip(weights, minus, strict=True):
            if weight.stream is None:
                weight.write_value(tensor)
            else:
                outs_minus.append(tensor)
        if inputs:
            fedkseed_kernels.seed_axpy_pair(
                inputs,
                [self.seed],
                [self.eps],
                streams=streams,
                residuals=residuals,
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
        whole, residual = weight.stored, weight.residual
        if weight.is_widened:
            # The noise of these rows, to which the widened rows are added: the same sum, rounded once.
            whole = torch.tensor(-0.0, dtype=weight.dtype, device=whole.device).expand(whole.shape)
            residual = None
        (found,) = fedkseed_kernels.seed_axpy(
            [whole],
            [self.seed],
            [sign * self.eps],
            streams=[weight.stream],
            residuals=[residual],
            rows=flat,
            **self._options(),
        )
        if weight.is_widened and weight.residual is None:
            found += weight.stored[flat]
        elif weight.is_widened and weight.residual is not None:
            values = torch.empty_like(found)
            write_compensated(weight.stored[flat], weight.residual[flat], values)
            found += values
        return found.view(shape)

    def whole(self, weight: Weight, sign: int) -> Tensor:
        """w + sign eps z in memory of its own."""
        out = torch.empty(weight.stored.shape, dtype=weight.dtype, device=weight.stored.device)
        self.write([weight], [out], sign)
        return out

    def _operands(
        self, weights: Sequence[Weight], out: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor], list[int], list[Tensor | None]]:
        """Inputs, outputs, streams and residuals of the launch.

        What has to be widened, or is not perturbed, is written to ``out`` here.
        """
        inputs, outs, streams, residuals = [], [], [], []
        for weight, tensor in zip(weights, out, strict=True):
            is_written = weight.is_widened or weight.stream is None
            if is_written:
                weight.write_value(tensor)
            if weight.stream is not None:
                inputs.append(tensor if is_written else weight.stored)
                residuals.append(None if is_written else weight.residual)
                outs.append(tensor)
                streams.append(weight.stream)
        return inputs, outs, streams, residuals

    def _options(self) -> dict[str, Any]:
        rounding = "nearest" if self.rounding_seed is None else "stochastic"
        return {"family": self.family, "rounding": rounding, "rounding_seed": self.rounding_seed}


def write_compensated(weight: Tensor, residual: Tensor, out: Tensor) -> None:
    """out = the fp32 that a weight of 16 bits and its residual stand for (contract, section 6.5)."""
    num_elements = max(weight.numel() // _NUM_PIECES, _SMALLEST_PIECE)
    pieces = zip(
        torch.split(weight.reshape(-1), num_elements),
        torch.split(residual.reshape(-1), num_elements),
        torch.split(out.view(-1), num_elements),
        strict=True,
    )
    for w, r, value in pieces:
        bits = value.view(torch.int32)
        if w.dtype == torch.bfloat16:
            bits.copy_(w.view(torch.int16)).bitwise_left_shift_(16).add_(r)
        else:
            value.copy_(w)
            # 2^E as bits, with E = -14 for what is smaller than 2^-14; then 2^(E - 25).
            scale = bits.bitwise_and(0x7F800000).clamp_(min=(127 - 14) << 23).sub_(25 << 23)
            value.add_(scale.view(torch.float32).mul_(r))
