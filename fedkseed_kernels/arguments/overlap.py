"""Exact tests of whether strided tensors share memory.

Element addresses of a tensor are start + sum_d x_d stride_d with 0 <= x_d < size_d, so two tensors share
memory exactly when a linear equation with bounded integer unknowns has a solution. Contiguous tensors are
settled by byte ranges alone; interleaved views (column slices of one matrix) by a search that settles them in
a few steps. A search that would be long gives up and answers None: callers refuse such tensors rather than
guess.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fedkseed_kernels.operands import TensorList

_SEARCH_LIMIT = 20_000

# An unknown k with lo <= k <= hi, times a positive coefficient.
_Unknown = tuple[int, int, int]


def _has_solution(unknowns: Sequence[_Unknown], target: int) -> bool | None:
    """Whether sum of coefficient * k == target for some k within bounds; None if the search was given up."""
    unknowns = sorted(unknowns, reverse=True)
    num_unknowns = len(unknowns)
    rest_low, rest_high, rest_gcd = (
        [0] * (num_unknowns + 1),
        [0] * (num_unknowns + 1),
        [0] * (num_unknowns + 1),
    )
    for i in range(num_unknowns - 1, -1, -1):
        coefficient, low, high = unknowns[i]
        rest_low[i] = rest_low[i + 1] + coefficient * low
        rest_high[i] = rest_high[i + 1] + coefficient * high
        rest_gcd[i] = math.gcd(rest_gcd[i + 1], coefficient)
    stack = [(0, target)]
    steps = 0
    while stack:
        i, remaining = stack.pop()
        if i == num_unknowns:
            if remaining == 0:
                return True
            continue
        if remaining % rest_gcd[i]:
            continue
        coefficient, low, high = unknowns[i]
        first = max(low, -((rest_high[i + 1] - remaining) // coefficient))
        last = min(high, (remaining - rest_low[i + 1]) // coefficient)
        steps += max(0, last - first + 1)
        if steps > _SEARCH_LIMIT:
            return None
        stack.extend((i + 1, remaining - coefficient * k) for k in range(first, last + 1))
    return False


def overlaps_itself(sizes: Sequence[int], strides: Sequence[int]) -> bool | None:
    """Whether two indices of a non-empty tensor address the same element; None if that was not settled."""
    dims = sorted((stride, size) for size, stride in zip(sizes, strides, strict=True) if size > 1)
    extent = 0
    for stride, size in dims:
        if stride <= extent:
            break
        extent += stride * (size - 1)
    else:
        return False
    if dims[0][0] == 0 or any(a[0] == b[0] for a, b in itertools.pairwise(dims)):
        return True
    # The difference of two indices with equal addresses has a largest stride at which it is not zero.
    for i, (stride, size) in enumerate(dims):
        smaller = [(s, 1 - n, n - 1) for s, n in dims[:i]]
        answer = _has_solution([(stride, 1, size - 1), *smaller], 0)
        if answer is not False:
            return answer
    return False


def _share_memory(a: Tensor, b: Tensor) -> bool | None:
    """Whether two non-empty tensors share a byte; None if that was not settled."""
    bytes_a, bytes_b = a.element_size(), b.element_size()
    target = b.data_ptr() - a.data_ptr()
    unit = bytes_a if bytes_a == bytes_b and target % bytes_a == 0 else 1
    # Equal strides share one unknown (the difference of the two indices), which keeps the search short.
    bounds: dict[int, tuple[int, int]] = {}

    def add(stride: int, low: int, high: int) -> None:
        old = bounds.get(stride, (0, 0))
        bounds[stride] = (old[0] + low, old[1] + high)

    for size, stride in zip(a.shape, a.stride(), strict=True):
        if size > 1 and stride:
            add(stride * bytes_a // unit, 0, size - 1)
    for size, stride in zip(b.shape, b.stride(), strict=True):
        if size > 1 and stride:
            add(stride * bytes_b // unit, 1 - size, 0)
    if unit == 1:
        add(1, 1 - bytes_b, bytes_a - 1)
    return _has_solution([(stride, low, high) for stride, (low, high) in bounds.items()], target // unit)


def _extent(tensor: Tensor) -> int:
    """Elements from the first to one past the last in memory, of a tensor that is not empty."""
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _ranges(items: TensorList) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """First byte and one past the last of each tensor."""
    extents = items.numels
    if not all(items.contiguous):
        extents = [
            n if flat or n == 0 else _extent(t)
            for t, n, flat in zip(items.tensors, items.numels, items.contiguous, strict=True)
        ]
    starts = np.array(items.addresses, dtype=np.uint64)
    sizes = np.array([dtype.itemsize for dtype in items.dtypes], dtype=np.uint64)
    return starts, starts + np.array(extents, dtype=np.uint64) * sizes


def find_shared(lists: Sequence[TensorList], num_changed: int | None = None) -> tuple[int, int, bool] | None:
    """Two tensors of all lists together that share memory, and whether that is certain; None if none do.

    O(n log n) when the byte ranges are disjoint; each pair of intersecting ranges of strided tensors adds a
    search.

    Args:
        num_changed: so many tensors, the first ones, are changed; the others may share memory among
            themselves. All of them if None.
    Returns: the positions of the two in the concatenation of the lists, ascending.
    """
    ranges = [_ranges(items) for items in lists]
    starts, ends = (np.concatenate(x) for x in zip(*ranges, strict=True))
    order = np.lexsort((ends, starts))
    order = order[ends[order] > starts[order]]
    if bool(np.all(ends[order][:-1] <= starts[order][1:])):  # sorted: neighbours are enough
        return None
    tensors = [t for items in lists for t in items.tensors]
    contiguous = [flat for items in lists for flat in items.contiguous]
    num_changed = len(tensors) if num_changed is None else num_changed
    open_changed: list[int] = []
    open_others: list[int] = []
    for i in order.tolist():
        open_changed = [j for j in open_changed if ends[j] > starts[i]]
        if i < num_changed:
            open_others = [j for j in open_others if ends[j] > starts[i]]
        for j in (*open_changed, *(open_others if i < num_changed else ())):
            shared = True if contiguous[i] and contiguous[j] else _share_memory(tensors[j], tensors[i])
            if shared is not False:
                return min(i, j), max(i, j), shared is True
        (open_changed if i < num_changed else open_others).append(i)
    return None


class Overlap(NamedTuple):
    """Two tensors that share memory: their positions, ascending, among the changed ones and then the others.

    `is_certain` is False where strides are too irregular to tell; such tensors are refused like the rest.
    """

    first: int
    second: int
    is_certain: bool


def find_overlap(changed: Sequence[Tensor], others: Sequence[Tensor] = ()) -> Overlap | None:
    """The check that calls in place make of their tensors, for those that will be made on `changed`.

    Args:
        changed: of one device, in memory, strided; of any dtype.
        others: read or kept beside them; what they share among themselves does not matter.

    Returns: two tensors that share memory, one of `changed` at least; None if there are none.
    """
    found = find_shared([TensorList(changed), TensorList(others)], len(changed))
    return None if found is None else Overlap(*found)
