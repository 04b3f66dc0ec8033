"""fp32 outputs of 16-bit weights, for backends that write the dtype that they read: in two passes."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fedkseed_kernels.operands import Operands, TensorList

# What is in between while a tensor is widened stays small beside it: so many pieces at most, none smaller
# than this many elements.
_NUM_PIECES, _SMALLEST_PIECE = 128, 1 << 16


def widened(operands: Operands) -> Operands:
    """The same call after writing each weight whose output is in fp32 there: it starts from that output.

    Mutates: those outputs.
    """
    inputs, outs = operands.inputs, operands.outs
    if inputs is None or inputs.dtypes == outs.dtypes:
        return operands
    sources = list(inputs.tensors)
    residuals = list(operands.residuals or [None] * len(sources))
    for position, (weight, out) in enumerate(zip(inputs.tensors, outs.tensors, strict=True)):
        if weight.dtype != out.dtype:
            write_value(weight, residuals[position], out)
            sources[position], residuals[position] = out, None
    has_any = any(residual is not None for residual in residuals)
    return replace(
        operands,
        inputs=TensorList(sources),
        residuals=residuals if has_any else None,
        table=None,
        device_tables=None,
    )


def write_value(weight: Tensor, residual: Tensor | None, out: Tensor) -> None:
    """out = the fp32 that a weight of 16 bits stands for, with its residual if any (contract section 6.5)."""
    if residual is None or not (weight.is_contiguous() and out.is_contiguous()):
        _write(weight, residual, out)
        return
    num_elements = max(weight.numel() // _NUM_PIECES, _SMALLEST_PIECE)
    pieces = (torch.split(tensor.view(-1), num_elements) for tensor in (weight, residual, out))
    for w, r, value in zip(*pieces, strict=True):
        _write(w, r, value)


def _write(weight: Tensor, residual: Tensor | None, out: Tensor) -> None:
    if residual is None:
        out.copy_(weight)
        return
    bits = out.view(torch.int32)
    if weight.dtype == torch.bfloat16:
        bits.copy_(weight.view(torch.int16)).bitwise_left_shift_(16).add_(residual)
    else:
        out.copy_(weight)
        # 2^E as bits, with E = -14 for what is smaller than 2^-14; then 2^(E - 25).
        scale = bits.bitwise_and(0x7F800000).clamp_(min=(127 - 14) << 23).sub_(25 << 23)
        out.add_(scale.view(torch.float32).mul_(residual))
