"""Memory that the units of a model take in turn."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# Tensors begin at multiples of it, as far as torch's own allocators align.
_ALIGNMENT = 64


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
        num_bytes = bytes_needed(shapes, dtypes)
        if self._buffer.numel() < self.num_bytes:
            self._buffer = torch.empty(self.num_bytes, dtype=torch.uint8, device=self._device)
        start = self.level
        self.level += num_bytes
        if self.level <= self.num_bytes:
            memory = self._buffer[start : self.level]
        else:
            memory = torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
        tensors, position = [], 0
        for shape, dtype in zip(shapes, dtypes, strict=True):
            size = math.prod(shape) * dtype.itemsize
            tensors.append(memory[position : position + size].view(dtype).view(shape))
            position += _aligned(size)
        return tensors

    def holds(self, tensor: Tensor) -> bool:
        """Whether the tensor is a piece of the buffer, and changes when that is used again."""
        return (
            tensor.layout is torch.strided
            and self._buffer.numel() > 0
            and tensor.untyped_storage().data_ptr() == self._buffer.untyped_storage().data_ptr()
        )


def bytes_needed(shapes: Sequence[torch.Size], dtypes: Sequence[torch.dtype]) -> int:
    """What `Scratch.take` takes for them."""
    sizes = zip(shapes, dtypes, strict=True)
    return sum(_aligned(math.prod(shape) * dtype.itemsize) for shape, dtype in sizes)


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
