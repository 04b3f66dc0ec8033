"""Geometry of operands: element indices of a tensor, and its dimensions merged where memory allows."""

from __future__ import annotations

from collections.abc import Sequence

from fedkseed_kernels.operands import MAX_DIMS, Operands, View


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
    Returns: the sizes and stride sets that are kept; none for a single element.
    """
    kept: list[int] = []
    kept_strides: list[list[int]] = [[] for _ in strides]
    for d, size in enumerate(sizes):
        if size == 1 and not (keep_first and d == 0):
            continue
        may_merge = len(kept) > (1 if keep_first else 0)
        if may_merge and all(a[-1] == s[d] * size for a, s in zip(kept_strides, strides, strict=True)):
            kept[-1] *= size
            for a, s in zip(kept_strides, strides, strict=True):
                a[-1] = s[d]
        else:
            kept.append(size)
            for a, s in zip(kept_strides, strides, strict=True):
                a.append(s[d])
    return kept, kept_strides


def collapsed_layout(operands: Operands, position: int) -> tuple[int, list[int], list[list[int]]]:
    """One tensor as the table has it: first element index, sizes, and the four stride sets.

    Those of the input in memory, the output, the minus output, and of the element indices.

    Raises:
        ValueError: more than MAX_DIMS dimensions are kept.
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
