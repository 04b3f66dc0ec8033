"""The native backend of CUDA tensors: the whole list in one call of the C library, on the current stream."""

from __future__ import annotations

import torch

from fedkseed_kernels import layout
from fedkseed_kernels.backends import native_cuda
from fedkseed_kernels.backends.native_cuda import unavailable
from fedkseed_kernels.operands import DeviceTerms, Operands, Terms

__all__ = ["WRITES_FP32", "seed_axpy", "unavailable"]

WRITES_FP32 = False


def seed_axpy(operands: Operands, terms: Terms | DeviceTerms, isa: str) -> None:
    """Write the primitive's result into `operands.outs` (and `outs_minus`); returns before it is there."""
    if operands.table is None:
        operands.table = layout.pointer_table(operands)
    if not operands.table.size:
        return
    device = operands.outs.tensors[0].device
    if isinstance(terms, Terms) and terms.seeds.size > native_cuda.MAX_TERMS_BY_VALUE:
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"expected at most {native_cuda.MAX_TERMS_BY_VALUE} terms from the host while a CUDA graph "
                f"is captured, got {terms.seeds.size}; pass seeds and coeffs as tensors on {device}"
            )
        terms = terms.to(device)
    num_source_rows = 0
    if operands.rows is not None and operands.inputs is not None:
        num_source_rows = operands.inputs.tensors[0].shape[0]
    index = torch.cuda.current_device() if device.index is None else device.index
    native_cuda.load_kernels(index)
    native_cuda.seed_axpy(
        native_cuda.library(),
        operands.table,
        operands.rows,
        num_source_rows,
        terms,
        index,
        torch.cuda.current_stream(device).cuda_stream,
    )
