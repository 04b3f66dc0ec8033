"""The Triton kernels compile for NVIDIA and AMD GPUs on a machine without any."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the Triton backend needs the package triton")

from benchmarks.machine_code import triton_kernels
from benchmarks.machine_code.triton_kernels import TARGETS, Variant

FEW = (
    Variant("gaussian", "bf16", 1),
    Variant("gaussian", "fp32", 0, "pair"),
    Variant("rademacher", "fp16", 2, stochastic=True),
    Variant("gaussian", "fp64", 0, "rows"),
    Variant("gaussian", "bf16", 1, compensated=True),
    Variant("rademacher", "fp16", 0, "pair", compensated=True),
)
# Fused or approximate arithmetic that nobody wrote, and subnormals flushed to zero.
FORBIDDEN = r"\.ftz|\.approx|\bmad\.rn\.f|\bmad\.f|sin\.|lg2\.|rsqrt|div\.full"


@pytest.mark.parametrize("variant", FEW, ids=lambda variant: variant.name)
@pytest.mark.parametrize(
    "target",
    [pytest.param(name, marks=() if name == "sm_90" else pytest.mark.slow) for name in TARGETS],
)
def test_compiles(target: str, variant: Variant) -> None:
    compiled = triton_kernels.compile_variant(variant, TARGETS[target])
    assert compiled.metadata.num_warps * TARGETS[target].warp_size == 128
    if target == "gfx942":
        assert compiled.asm["amdgcn"]
        return
    assert compiled.asm["cubin"][:4] == b"\x7fELF"
    assert not re.search(FORBIDDEN, compiled.asm["ptx"])


@pytest.mark.slow
def test_every_fma_is_written_out(tmp_path: Path) -> None:
    """8.5 fma a normal in the loop over terms: 15 of the transform and two sums a word; nothing was fused."""
    from benchmarks.machine_code import reader, rows, rules

    compiled = triton_kernels.compile_variant(Variant("gaussian", "fp32", 0), TARGETS["sm_90"])
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    ((function, usage),) = reader.read_cubin(cubin)
    row = rows.measure(function, usage, "sm_90", rules.Rule("loop", "gaussian", 0, 8))
    assert row.classes["FMA"] == 8.5
    assert row.barriers_on_hot_path == row.spills == row.stack == 0
    assert row.instructions_per_element <= 26.5
