"""w +- eps z beside the stored weights: the perturbed copies, and the scratch memory that holds them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import fedkseed_kernels
from fedkseed.model.named_errors import errors_named
from fedkseed.model.packed import packed_bytes, packed_views
from fedkseed.storage.updates import rounding_options


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

    @property
    def rounding(self) -> dict[str, Any]:
        """Keyword arguments of the kernels' functions that say how they round."""
        return rounding_options(self.rounding_seed)

    def rows(self, weight: Weight, ids: Tensor, sign: int) -> Tensor:
        """Rows ids of w + sign eps z, of shape [*ids.shape, *w.shape[1:]]; no other row is drawn."""
        flat = ids.reshape(-1).long()
        shape = (*ids.shape, *weight.stored.shape[1:])
        if weight.stream is None:
            return weight.stored[flat].to(weight.dtype).view(shape)
        source, residual = weight.stored, weight.residual
        if weight.is_widened:
            # The noise of these rows, to which the widened rows are added: the same sum, rounded once.
            zero = torch.tensor(-0.0, dtype=weight.dtype, device=source.device)
            source, residual = zero.expand(source.shape), None
        (found,) = fedkseed_kernels.seed_axpy(
            [source],
            [self.seed],
            [sign * self.eps],
            streams=[weight.stream],
            residuals=[residual],
            rows=flat,
            family=self.family,
            **self.rounding,
        )
        if weight.is_widened:
            found += _widened(weight, flat)
        return found.view(shape)


class Scratch:
    """A stack of tensors in one buffer, which is allocated when it is first needed and kept.

    Args:
        num_bytes: of the buffer. What does not fit gets memory of its own for as long as it is in use.
        device: of the tensors.

    Attributes:
        num_bytes: as given.
    """

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self.num_bytes = num_bytes
        self._device = device
        self._buffer = torch.empty(0, dtype=torch.uint8, device=device)
        #: Bytes in use; setting it back to an earlier value frees what was taken since.
        self.level = 0

    def take(self, shapes: Sequence[torch.Size], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
        """Tensors with undefined values, valid until `level` is set back."""
        num_bytes = packed_bytes(shapes, dtypes)
        if self._buffer.numel() < self.num_bytes:
            self._buffer = torch.empty(self.num_bytes, dtype=torch.uint8, device=self._device)
        start = self.level
        self.level += num_bytes
        if self.level <= self.num_bytes:
            memory = self._buffer[start : self.level]
        else:
            memory = torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
        return packed_views(memory, shapes, dtypes)

    def holds(self, tensor: Tensor) -> bool:
        """Whether the tensor is a piece of the buffer, and changes when that is used again."""
        return (
            tensor.layout is torch.strided
            and self._buffer.numel() > 0
            and tensor.untyped_storage().data_ptr() == self._buffer.untyped_storage().data_ptr()
        )


class Copies:
    """w +- eps z of some weights, in memory of their own: checked once, one launch each time.

    Args:
        weights: of which those that have a stream are perturbed; the others are converted.
        sides: for one side, or for both, tensors of each weight's shape and ``dtype``.
        family: of the noise.

    Attributes:
        sides: as given.
    """

    def __init__(self, weights: Sequence[Weight], sides: Sequence[Sequence[Tensor]], family: str) -> None:
        self.sides = sides
        perturbed = [weight for weight in weights if weight.stream is not None]
        outs = [
            [tensor for weight, tensor in zip(weights, side, strict=True) if weight.stream is not None]
            for side in sides
        ]
        self._converted = [
            (weight.stored, tensor)
            for side in sides
            for weight, tensor in zip(weights, side, strict=True)
            if weight.stream is None
        ]
        self._handle: fedkseed_kernels.Prepared | None = None
        self._names = [weight.name for weight in perturbed]
        if perturbed:
            prepare = fedkseed_kernels.prepare_out if len(sides) == 1 else fedkseed_kernels.prepare_pair
            self._handle = prepare(
                [weight.stored for weight in perturbed],
                *outs,
                streams=[weight.stream for weight in weights if weight.stream is not None],
                family=family,
                residuals=[weight.residual for weight in perturbed],
            )

    def write(self, perturbation: Perturbation, sign: int) -> None:
        """w + sign eps z, of widened weights not rounded to 16 bits. Both sides take one draw of the noise.

        Args:
            sign: 1 or -1, of the first side.
        """
        for stored, tensor in self._converted:
            tensor.copy_(stored)
        if self._handle is not None:
            with errors_named(self._names):
                self._handle.seed_axpy(
                    [perturbation.seed], [sign * perturbation.eps], **perturbation.rounding
                )


def _widened(weight: Weight, flat: Tensor) -> Tensor:
    """Some rows of a weight as its forward pass gets them, without noise."""
    stored = weight.stored[flat]
    residual = None if weight.residual is None else weight.residual[flat]
    out = torch.empty(stored.shape, dtype=weight.dtype, device=stored.device)
    fedkseed_kernels.seed_axpy([stored], [], [], residuals=[residual], out=[out])
    return out
