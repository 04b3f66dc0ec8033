"""Tensor lists, streams, offsets and views: from what callers write to what the schemas take."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from fedkseed_kernels.operands import View

Tensors = Tensor | Sequence[Tensor]
Residuals = Tensor | Sequence[Tensor | None]


def tensor_list(tensors: Tensors, name: str) -> list[Tensor]:
    """A list of tensors from one tensor, a list or a tuple.

    Raises:
        TypeError: anything else, for example a generator.
    """
    if isinstance(tensors, Tensor):
        return [tensors]
    if not isinstance(tensors, (list, tuple)):
        raise TypeError(
            f"expected {name} as a tensor or a list or tuple of tensors, got {type(tensors).__name__}; "
            "use list(...)"
        )
    if not all([isinstance(t, Tensor) for t in tensors]):
        position, item = next((i, t) for i, t in enumerate(tensors) if not isinstance(t, Tensor))
        raise TypeError(f"expected {name}[{position}] to be a tensor, got {type(item).__name__}")
    return list(tensors)


def encode_residuals(residuals: Residuals | None, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Residuals for the schema: an empty int16 tensor where an entry is None; an empty list if all are.

    Raises:
        TypeError: neither a tensor nor a list or tuple of tensors and None.
        ValueError: not one for each tensor, or an empty one of a tensor that is not.
    """
    if residuals is None:
        return []
    items = [residuals] if isinstance(residuals, Tensor) else residuals
    if not isinstance(items, (list, tuple)) or not all([r is None or isinstance(r, Tensor) for r in items]):
        kinds = sorted({type(r).__name__ for r in items}) if isinstance(items, (list, tuple)) else type(items)
        raise TypeError(f"expected residuals as a list or tuple of int16 tensors or None, got {kinds}")
    if len(items) != len(tensors):
        raise ValueError(
            f"expected {len(tensors)} residuals, one (or None) for each tensor, got {len(items)}"
        )
    if all([r is None for r in items]):
        return []
    encoded = []
    for position, (residual, tensor) in enumerate(zip(items, tensors, strict=True)):
        if residual is None:
            residual = torch.empty(0, dtype=torch.int16, device=tensor.device)
        elif residual.numel() == 0 and tensor.numel() != 0:
            raise ValueError(
                f"expected residuals[{position}] of shape {tuple(tensor.shape)}, got {tuple(residual.shape)}"
            )
        encoded.append(residual)
    return encoded


def encode_indices(
    values: Sequence[int | None] | None,
    name: str,
    num_tensors: int,
    views: Sequence[View | None] | None = None,
) -> list[int]:
    """Streams or offsets for the schema: empty for the default, 0 where an entry is None.

    Raises:
        ValueError: not one for each tensor, outside [0, 2^63), or beside a view of the same tensor.
    """
    if values is None:
        return []
    if len(values) != num_tensors:
        raise ValueError(f"expected {num_tensors} {name}, one for each tensor, got {len(values)}")
    encoded = []
    for position, value in enumerate(values):
        number = 0 if value is None else operator.index(value)
        if not 0 <= number < 1 << 63:
            raise ValueError(f"expected {name} in [0, 2^63), got {number} at position {position}")
        if value is not None and views is not None and views[position] is not None:
            raise ValueError(f"expected a view or an offset, got both for tensors[{position}]; leave one out")
        encoded.append(number)
    return encoded


def encode_views(views: Sequence[View | None] | None, num_tensors: int) -> list[int]:
    """Views for the schema: for each tensor -1, or its number of dimensions, full shape, start. Empty: none.

    Raises:
        ValueError: not one for each tensor, or not a pair of equally many numbers.
    """
    if views is None:
        return []
    if len(views) != num_tensors:
        raise ValueError(f"expected {num_tensors} views, one (or None) for each tensor, got {len(views)}")
    if all(v is None for v in views):
        return []
    flat: list[int] = []
    for position, view in enumerate(views):
        if view is None:
            flat.append(-1)
            continue
        if not isinstance(view, (tuple, list)) or len(view) != 2 or len(view[0]) != len(view[1]):
            raise ValueError(
                f"expected views[{position}] as (full_shape, start), one number per dimension, got {view}"
            )
        flat += [len(view[0]), *map(operator.index, view[0]), *map(operator.index, view[1])]
    return flat


def decode_views(flat: Sequence[int], num_tensors: int) -> list[View | None]:
    """The inverse of `encode_views`.

    Raises:
        ValueError: not of that form, or not for num_tensors tensors.
    """
    if not flat:
        return [None] * num_tensors
    views: list[View | None] = []
    at = 0
    while at < len(flat):
        ndim = flat[at]
        at += 1
        if ndim < 0:
            views.append(None)
        else:
            views.append((flat[at : at + ndim], flat[at + ndim : at + 2 * ndim]))
            at += 2 * ndim
    if len(views) != num_tensors or at != len(flat):
        raise ValueError(f"expected one view or None for each of {num_tensors} tensors, got {len(views)}")
    return views
