"""The tensors of one call: in the emulated memory and on the reference's side, and how they differ."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ptx.memory import ALIGNMENT, READ, WRITE, Memory

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_NUMPY = {1: np.uint8, 2: np.int16, 4: np.int32, 8: np.int64}
#: Weights that are zeros of both signs, infinite, NaN, subnormal in some dtype, or at an end of its range.
SPECIAL = (
    *(0.0, -0.0, float("inf"), float("-inf"), float("nan"), 1e-40, -1e-40, 6e-8, -6e-5),
    *(65504.0, 3e38, -3.3e38, 1.0, -1.0),
)


@dataclass(frozen=True)
class Spec:
    """A tensor whose storage begins `skew` elements past an aligned address."""

    shape: tuple[int, ...]
    offset: int = 0
    skew: int = 0
    layout: str = "flat"  # of its memory; or: transposed, gaps (a slice of wider rows), padded, every second
    view: tuple[tuple[int, ...], tuple[int, ...]] | None = None


def layout_of(spec: Spec, shape: Sequence[int]) -> tuple[list[int], int]:
    """(strides, elements of storage) of a shape that is laid out as the spec says."""

    def dense(sizes: Sequence[int], row: int | None = None) -> tuple[list[int], int]:
        strides: list[int] = []
        step = 1
        for i, size in enumerate(reversed(sizes)):
            strides.insert(0, step)
            step = row if row is not None and i == 0 else step * max(size, 1)
        return strides, step

    if spec.layout == "transposed":
        strides, count = dense(shape[::-1])
        return strides[::-1], count
    if spec.layout == "gaps":
        return dense(shape, row=shape[-1] + 5)
    strides, count = dense([size + 1 for size in shape] if spec.layout == "padded" else shape)
    factor = 2 if spec.layout == "every second" else 1
    return [factor * stride for stride in strides], factor * count


class Twins(NamedTuple):
    """A tensor in the emulated memory, and the reference's of the same content."""

    here: Tensor
    there: Tensor


Fill = Callable[[Tensor], None]


@dataclass
class World:
    """The tensors of one case."""

    generator: np.random.Generator
    size: int
    outputs: list[Twins] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.memory = Memory(self.size, int(self.generator.integers(1 << 30)))

    def tensor(self, spec: Spec, shape: Sequence[int], dtype: torch.dtype, rights: int, fill: Fill) -> Twins:
        strides, count = layout_of(spec, shape)
        size = dtype.itemsize
        raw = self.memory.allocate(max(count, 1) * size, rights, spec.skew * size)
        flat = torch.from_numpy(raw.view(_NUMPY[size])).view(dtype)
        fill(flat)
        made = Twins(flat.as_strided(shape, strides), flat.clone().as_strided(shape, strides))
        if rights & WRITE:
            self.outputs.append(made)
        return made

    def weights(self, flat: Tensor) -> None:
        flat.copy_(torch.from_numpy(self.generator.standard_normal(flat.numel()) * 0.05))

    def special_weights(self, flat: Tensor) -> None:
        self.weights(flat)
        some = self.generator.choice(flat.numel(), max(flat.numel() // 7, 1), replace=False)
        values = torch.tensor(SPECIAL, dtype=torch.float64).to(flat.dtype)
        chosen = self.generator.integers(0, len(SPECIAL), some.size)
        flat[torch.from_numpy(some)] = values[torch.from_numpy(chosen)]

    def noise(self, flat: Tensor) -> None:
        bits = self.generator.integers(-(1 << 15), 1 << 15, flat.numel())
        flat.view(_BITS[flat.element_size()]).copy_(torch.from_numpy(bits))

    def values(self, values: Sequence[float], dtype: torch.dtype, rights: int = READ) -> Tensor:
        """A tensor of the kernels alone."""
        size = dtype.itemsize
        raw = self.memory.allocate(size * len(values), rights)
        return torch.from_numpy(raw.view(_NUMPY[size])).view(dtype).copy_(torch.tensor(values, dtype=dtype))

    def snapshot(self) -> None:
        self._before, self._end = self.memory.bytes.copy(), self.memory.allocated_end

    def differences(self) -> Differences:
        """What differs from the reference, and what changed outside of outputs."""
        found = Differences()
        touched = np.zeros(self.memory.size, bool)
        for here, there in self.outputs:
            if not here.numel():
                continue
            size = here.element_size()
            at = torch.zeros(here.shape, dtype=torch.int64)
            for dim, (length, stride) in enumerate(zip(here.shape, here.stride(), strict=True)):
                index = torch.arange(length) * (stride * size)
                at += index.reshape([-1 if d == dim else 1 for d in range(here.dim())])
            places = at.reshape(-1).numpy() + (here.data_ptr() - self.memory.base)
            touched[(places[:, None] + np.arange(size)).reshape(-1)] = True
            found.compare(here, there)
        stray = (self.memory.bytes != self._before) & ~touched
        stray[self._end - ALIGNMENT :] = False  # what a launcher put there itself
        found.num_stray = int(stray.sum())
        return found


@dataclass
class Differences:
    """Elements that differ from the reference, with an example, and bytes of no output that changed."""

    num_wrong: int = 0
    num_stray: int = 0
    num_nan: int = 0  # NaN on both sides, of other bits
    num_elements: int = 0
    example: str = ""

    def compare(self, here: Tensor, there: Tensor) -> None:
        size = here.element_size()
        got, want = (t.contiguous().view(_BITS[size]).reshape(-1) for t in (here, there))
        different = got != want
        if here.is_floating_point():
            both_nan = here.contiguous().reshape(-1).isnan() & there.contiguous().reshape(-1).isnan()
            self.num_nan += int((different & both_nan).sum())
            different &= ~both_nan
        self.num_elements += here.numel()
        self.num_wrong += int(different.sum())
        if different.any() and not self.example:
            i, mask = int(different.nonzero()[0]), (1 << 8 * size) - 1
            values = f"{int(got[i]) & mask:#x}, reference {int(want[i]) & mask:#x}"
            self.example = f"element {i} of {tuple(here.shape)}: {values}"
