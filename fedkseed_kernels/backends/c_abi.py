"""What both compiled libraries share: structs of their headers, the pointer table, the release check."""

from __future__ import annotations

import ctypes
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedkseed_kernels.contract.reference import CONTRACT_VERSION
from fedkseed_kernels.layout import collapsed_layout, strided_positions
from fedkseed_kernels.operands import DTYPE_CODES, MAX_DIMS, Operands

ABI_VERSION = 4

LIBRARY_FOLDER = Path(__file__).parents[1] / "_lib"
BUILD_INFO_PATH = LIBRARY_FOLDER / "build_info.json"

STRIDE_FIELDS = ("in_strides", "out_strides", "out_minus_strides", "element_strides")

_Strides = ctypes.c_int64 * MAX_DIMS


class FkTensor(ctypes.Structure):
    """struct fk_tensor of fedkseed.h."""

    _fields_ = (
        ("in", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("out_minus", ctypes.c_void_p),
        ("residual", ctypes.c_void_p),
        ("residual_out", ctypes.c_void_p),
        ("numel", ctypes.c_int64),
        ("first_element", ctypes.c_int64),
        ("stream", ctypes.c_uint32),
        ("dtype", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("out_dtype", ctypes.c_int32),
        ("sizes", _Strides),
        ("in_strides", _Strides),
        ("out_strides", _Strides),
        ("out_minus_strides", _Strides),
        ("element_strides", _Strides),
    )


class FkTerms(ctypes.Structure):
    """struct fk_terms of fedkseed.h."""

    _fields_ = (
        ("seeds", ctypes.c_void_p),
        ("coeffs", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("alpha", ctypes.c_double),
        ("family", ctypes.c_int32),
        ("rounding", ctypes.c_int32),
        ("rounding_seed", ctypes.c_uint64),
    )


class FkCudaTerms(ctypes.Structure):
    """struct fk_cuda_terms of fedkseed_cuda.h."""

    _fields_ = (
        ("seeds", ctypes.c_void_p),
        ("coeffs", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("alpha", ctypes.c_double),
        ("device_alpha", ctypes.c_void_p),
        ("rounding_seed", ctypes.c_uint64),
        ("device_rounding_seed", ctypes.c_void_p),
        ("num_skipped", ctypes.c_void_p),
        ("seeds_on_device", ctypes.c_int32),
        ("coeffs_on_device", ctypes.c_int32),
        ("family", ctypes.c_int32),
        ("rounding", ctypes.c_int32),
    )


# The same layout for NumPy, so that the table of a long list is filled column by column.
TABLE_DTYPE: np.dtype[Any] = np.dtype(FkTensor)


def recorded_reason(library: str) -> str | None:
    """Why there is no library "cpu" or "cuda", as the installation recorded it; None if it left no record."""
    try:
        reason = str(json.loads(BUILD_INFO_PATH.read_text())[library]["reason"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return reason or "it was removed since"


def other_release(handle: ctypes.CDLL, path: Path) -> str | None:
    """How a library differs in release from this package; None if it does not."""
    for symbol, expected in (("fk_abi_version", ABI_VERSION), ("fk_contract_version", CONTRACT_VERSION)):
        version = getattr(handle, symbol, None)
        got = "none" if version is None else version()
        if got != expected:
            return f"{path} is of another release: {symbol} expected {expected}, got {got}"
    return None


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
    """The table of fk_tensor entries of a list of tensors, one for each tensor.

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
