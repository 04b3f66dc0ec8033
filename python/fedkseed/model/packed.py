"""Tensors side by side in one buffer: scratch of one process, or memory that several processes see."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

#: Bytes. Tensors begin at multiples of it: a cache line, as far as torch's own allocators align.
_ALIGNMENT = 64


def packed_bytes(shapes: Sequence[Sequence[int]], dtypes: Sequence[torch.dtype]) -> int:
    """Size of the buffer that tensors of these shapes and dtypes take, each aligned."""
    return sum(_aligned(_num_bytes(shape, dtype)) for shape, dtype in zip(shapes, dtypes, strict=True))


def packed_views(
    buffer: torch.Tensor, shapes: Sequence[Sequence[int]], dtypes: Sequence[torch.dtype]
) -> list[torch.Tensor]:
    """Views of a buffer as tensors of these shapes and dtypes, in order.

    Args:
        buffer: uint8, of at least `packed_bytes`.
    """
    views, start = [], 0
    for shape, dtype in zip(shapes, dtypes, strict=True):
        size = _num_bytes(shape, dtype)
        views.append(buffer[start : start + size].view(dtype).view(tuple(shape)))
        start += _aligned(size)
    return views


@dataclass(frozen=True)
class SharedTensors:
    """Tensors of given shapes and dtypes in one shared buffer (one file descriptor, however many they are).

    Sent to another process through torch.multiprocessing, it is the same memory there.

    Attributes:
        buffer: uint8 [bytes], in shared memory.
        shapes, dtypes: of the tensors.
    """

    buffer: torch.Tensor
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]

    @classmethod
    def empty_like(cls, tensors: Sequence[torch.Tensor]) -> SharedTensors:
        """Room for tensors like these; the content is zero."""
        shapes = tuple(tuple(tensor.shape) for tensor in tensors)
        dtypes = tuple(tensor.dtype for tensor in tensors)
        buffer = torch.zeros(packed_bytes(shapes, dtypes), dtype=torch.uint8)
        buffer.share_memory_()  # type: ignore[no-untyped-call]
        return cls(buffer, shapes, dtypes)

    def tensors(self) -> list[torch.Tensor]:
        """Views of the buffer, in order."""
        return packed_views(self.buffer, self.shapes, self.dtypes)


def _num_bytes(shape: Sequence[int], dtype: torch.dtype) -> int:
    return math.prod(shape) * dtype.itemsize


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
