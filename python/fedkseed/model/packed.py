"""Tensors that several processes of one machine see: one piece of shared memory for a whole model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

_ALIGNMENT = 64  # bytes: a cache line, and more than any dtype needs


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
        size = sum(_room(shape, dtype) for shape, dtype in zip(shapes, dtypes, strict=True))
        buffer = torch.zeros(size, dtype=torch.uint8)
        buffer.share_memory_()  # type: ignore[no-untyped-call]
        return cls(buffer, shapes, dtypes)

    def tensors(self) -> list[torch.Tensor]:
        """Views of the buffer, in order."""
        views, start = [], 0
        for shape, dtype in zip(self.shapes, self.dtypes, strict=True):
            stop = start + torch.Size(shape).numel() * dtype.itemsize
            views.append(self.buffer[start:stop].view(dtype).view(shape))
            start += _room(shape, dtype)
        return views


def _room(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    size = torch.Size(shape).numel() * dtype.itemsize
    return (size + _ALIGNMENT - 1) // _ALIGNMENT * _ALIGNMENT
