"""Exact arithmetic for Triton's interpreter, which rounds differently from every GPU.

Its fma rounds twice in some releases, and its conversion to bf16 truncates. While the kernels run in it,
both are those of the noise contract, so that it gives the contract's bits too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from fedkseed_kernels.contract import arithmetic


def _fma(builder: InterpreterBuilder, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
    exact = {np.dtype(np.float32): arithmetic.fma32, np.dtype(np.float64): arithmetic.fma64}[z.data.dtype]
    return TensorHandle(exact(x.data, y.data, z.data), z.dtype.scalar)


@contextmanager
def exact_arithmetic() -> Iterator[None]:
    """Run Triton's interpreter with exact fma and bf16 conversions, subnormals kept, within a block."""
    builder: Any = InterpreterBuilder
    original_fma, original_cast = builder.create_fma, builder.cast_impl

    def cast(self: InterpreterBuilder, source: TensorHandle, target: Any) -> TensorHandle:
        kinds = (source.dtype.scalar, target.scalar)
        if kinds == (tl.float32, tl.bfloat16):
            return TensorHandle(arithmetic.round_to_bf16(source.data), tl.bfloat16)
        if kinds == (tl.bfloat16, tl.float32):
            return TensorHandle(arithmetic.widen_bf16(source.data), tl.float32)
        return original_cast(self, source, target)

    builder.create_fma, builder.cast_impl = _fma, cast
    try:
        with arithmetic.ieee_arithmetic():
            yield
    finally:
        builder.create_fma, builder.cast_impl = original_fma, original_cast
