"""From checked tensors to the pointer table of the C ABI: memory strides beside element strides."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedkseed_kernels.backends.native_cpu import TABLE_DTYPE
from fedkseed_kernels.operands import DTYPE_CODES, MAX_DIMS, Operands, View

STRIDE_FIELDS = ("in_strides", "out_strides", "out_minus_strides", "element_strides")


def row_major_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides, in elements, of a contiguous tensor of this shape."""
    strides = [1] * len(shape)
    for d in range(len(shape) - 2, -1, -1):
        strides[d] = strides[d + 1] * shape[d + 1]
    return tuple(strides)


def element_layout(shape: Sequence[int], offset: int, view: View | None) -> tuple[int, tuple[int, ...]]:
    """Element index of a tensor's first element, and the step of the element index along each dimension."""
    if view is None:
        return offset, row_major_strides(shape)
    full_shape, start = view
    strides = row_major_strides(full_shape)
    return sum(s * stride for s, stride in zip(start, strides, strict=True)), strides


def collapse(
    sizes: Sequence[int], strides: Sequence[Sequence[int]], keep_first: bool
) -> tuple[list[int], list[list[int]]]:
    """Drop dimensions of size 1; merge neighbours that every set of strides walks through as one.

    Args:
        sizes: [ndim].
        strides: any number of stride sets, each [ndim].
        keep_first: leave dimension 0 as it is, because `rows` indexes it.
    Returns: the sizes and stride sets that are left; none for a single element.
    """
    left: list[int] = []
    left_strides: list[list[int]] = [[] for _ in strides]
    for d, size in enumerate(sizes):
        if size == 1 and not (keep_first and d == 0):
            continue
        may_merge = len(left) > (1 if keep_first else 0)
        if may_merge and all(a[-1] == s[d] * size for a, s in zip(left_strides, strides, strict=True)):
            left[-1] *= size
            for a, s in zip(left_strides, strides, strict=True):
                a[-1] = s[d]
        else:
            left.append(size)
            for a, s in zip(left_strides, strides, strict=True):
                a.append(s[d])
    return left, left_strides


def collapsed_layout(operands: Operands, position: int) -> tuple[int, list[int], list[list[int]]]:
    """One tensor as the table has it: first element index, sizes, and stride sets (STRIDE_FIELDS).

    Raises:
        ValueError: more than MAX_DIMS dimensions are left.
    """
    out = operands.outs.tensors[position]
    source = out if operands.inputs is None else operands.inputs.tensors[position]
    minus = out if operands.outs_minus is None else operands.outs_minus.tensors[position]
    first, element_strides = element_layout(
        source.shape, operands.offsets[position], operands.views[position]
    )
    stride_sets = (source.stride(), out.stride(), minus.stride(), element_strides)
    sizes, collapsed = collapse(out.shape, stride_sets, keep_first=operands.rows is not None)
    if len(sizes) > MAX_DIMS:
        raise ValueError(
            f"expected tensors of at most {MAX_DIMS} dimensions that cannot be merged, got {len(sizes)} in "
            f"tensors[{position}] (shape {tuple(out.shape)}); pass a contiguous copy"
        )
    return first, sizes, collapsed


def _fill_strided(entry: np.void, operands: Operands, position: int) -> None:
    """Complete the table entry of a tensor that is not simply contiguous (it may collapse to that)."""
    first, sizes, collapsed = collapsed_layout(operands, position)
    entry["first_element"] = first
    if operands.rows is None and len(sizes) <= 1 and all(s in ([], [1]) for s in collapsed):
        return
    ndim = len(sizes)
    entry["ndim"] = ndim
    entry["sizes"][:ndim] = sizes
    for name, values in zip(STRIDE_FIELDS, collapsed, strict=True):
        entry[name][:ndim] = values


def pointer_table(operands: Operands) -> NDArray[np.void]:
    """The table of fk_tensor entries for `native.cpu_seed_axpy`, one for each tensor.

    Raises:
        ValueError: a tensor has more than MAX_DIMS dimensions after merging.
    """
    outs = operands.outs
    table = np.zeros(len(outs.tensors), dtype=TABLE_DTYPE)
    if operands.inputs is not None:
        table["in"] = operands.inputs.addresses
    table["out"] = outs.addresses
    if operands.outs_minus is not None:
        table["out_minus"] = operands.outs_minus.addresses
    if operands.residuals is not None:
        table["residual"] = [0 if r is None else r.data_ptr() for r in operands.residuals]
        if operands.writes_residuals:
            table["residual_out"] = table["residual"]
    table["numel"] = outs.numels
    table["first_element"] = operands.offsets
    table["stream"] = operands.streams
    table["out_dtype"] = [DTYPE_CODES[dtype] for dtype in outs.dtypes]
    table["dtype"] = [DTYPE_CODES[dtype] for dtype in (operands.inputs or outs).dtypes]
    for position in strided_positions(operands):
        if outs.numels[position]:
            _fill_strided(table[position], operands, position)
    return table


def strided_positions(operands: Operands) -> Sequence[int]:
    """Positions of the tensors that are not plainly contiguous, in memory and in element indices."""
    num_tensors = len(operands.outs.tensors)
    if operands.rows is not None:
        return range(num_tensors)
    lists = {
        id(x): x for x in (operands.inputs, operands.outs, operands.outs_minus) if x is not None
    }.values()
    if all(all(x.contiguous) for x in lists) and not any(operands.views):
        return ()
    return [i for i in range(num_tensors) if operands.views[i] or not all(x.contiguous[i] for x in lists)]
