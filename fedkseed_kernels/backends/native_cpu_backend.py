"""The native backend: the whole list in one call of the C library."""

from __future__ import annotations

from fedkseed_kernels import layout
from fedkseed_kernels.backends import native_cpu
from fedkseed_kernels.backends.native_cpu import unavailable
from fedkseed_kernels.operands import Operands, Terms

__all__ = ["WRITES_FP32", "seed_axpy", "unavailable"]

WRITES_FP32 = True


def seed_axpy(operands: Operands, terms: Terms, isa: str) -> None:
    """Write the primitive's result into `operands.outs` (and `outs_minus`)."""
    if operands.table is None:
        operands.table = layout.pointer_table(operands)
    if operands.table.size:
        rows = None if operands.rows is None else operands.rows.numpy()
        native_cpu.cpu_seed_axpy(operands.table, rows, terms, isa)
