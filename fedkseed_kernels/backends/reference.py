"""The reference backend: hands torch tensors to the NumPy reference of the noise contract, chunk by chunk.

It works from the tensors, offsets and views themselves rather than from the native pointer table, so that
comparing the two backends also checks the table.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedkseed_kernels.contract import reference
from fedkseed_kernels.layout import element_layout
from fedkseed_kernels.operands import Operands, Terms
from fedkseed_kernels.self_test.gate import SelfTest

WRITES_FP32 = True
SELF_TEST: SelfTest | None = None  # the others are compared with it

# Measured on one Zen 3 core against AVX2: fp32, bf16 and fp64, one and 16 seeds.
COST = "100 to 350 times slower than the native library (about 0.2 microseconds for each weight and seed)"

_NAMES = {getattr(torch, name): name for name in reference.DTYPES}


def unavailable(device: torch.device | None = None) -> str | None:
    """None: NumPy is always there."""
    return None


def _stored(tensor: Tensor) -> NDArray[Any]:
    """The tensor's memory as NumPy sees it: bit patterns for bf16 and fp16, at least one dimension."""
    tensor = tensor.detach()
    if tensor.element_size() == 2:
        tensor = tensor.view(torch.uint16)
    array: NDArray[Any] = tensor.numpy()
    return array[None] if array.ndim == 0 else array


def _residuals(operands: Operands, position: int) -> NDArray[np.int16] | None:
    residual = None if operands.residuals is None else operands.residuals[position]
    if residual is None:
        return None
    array: NDArray[np.int16] = residual.numpy()
    return array[None] if array.ndim == 0 else array


def seed_axpy(operands: Operands, terms: Terms) -> None:
    """Write the primitive's result into `operands.outs` (and `outs_minus`)."""
    for position in range(len(operands.outs.tensors)):
        _one_tensor(operands, terms, position)


def _one_tensor(operands: Operands, terms: Terms, position: int) -> None:
    out = _stored(operands.outs.tensors[position])
    source = out if operands.inputs is None else _stored(operands.inputs.tensors[position])
    minus = None if operands.outs_minus is None else _stored(operands.outs_minus.tensors[position])
    shape = (operands.inputs or operands.outs).tensors[position].shape
    first, element_strides = element_layout(shape, operands.offsets[position], operands.views[position])
    rows = None if operands.rows is None else operands.rows.numpy()
    out_dtype, stream = operands.outs.dtypes[position], operands.streams[position]
    dtype = out_dtype if operands.inputs is None else operands.inputs.dtypes[position]
    name = _NAMES[dtype]
    residuals = _residuals(operands, position)
    common: dict[str, Any] = {
        "dtype": name,
        "stream": stream,
        "alpha": terms.alpha,
        "family": terms.family,
    }
    rounding: dict[str, Any] = {
        "rounding": terms.rounding,
        "rounding_seed": terms.rounding_seed if terms.rounding == "stochastic" else None,
    }
    seeds = terms.seeds.tolist()
    for start in range(0, out.size, reference.CHUNK_ELEMENTS):
        stop = min(start + reference.CHUNK_ELEMENTS, out.size)
        to = np.unravel_index(np.arange(start, stop), out.shape)
        at = to if rows is None else (rows[to[0]], *to[1:])
        elements = np.full(stop - start, first, dtype=np.int64)
        for x, stride in zip(at, element_strides, strict=False):
            elements += x * stride
        residuals_read = None if residuals is None else residuals[at]
        if operands.inputs is None:
            out[to] = reference.normal_array(seeds[0], stream, elements, name, terms.family)
        elif residuals is not None and residuals_read is not None and operands.writes_residuals:
            out[to], residuals[to] = reference.seed_axpy_compensated_array(
                source[at], residuals_read, elements, seeds, terms.coeffs, **common
            )
        else:
            call = reference.seed_axpy_array if minus is None else reference.seed_axpy_pair_array
            options = {**common, **rounding, "residuals": residuals_read, "wide": dtype != out_dtype}
            result: Any = call(source[at], elements, seeds, terms.coeffs, **options)
            if minus is None:
                out[to] = result
            else:
                out[to], minus[to] = result
