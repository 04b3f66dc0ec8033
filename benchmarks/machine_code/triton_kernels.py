"""The Triton kernels as the package launches them, compiled for GPUs that need not be here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fedkseed_kernels.backends.triton import launch
from fedkseed_kernels.backends.triton.kernels import runs_kernel, segments_kernel

MANY_TILES = 1 << 20
DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp64": torch.float64,
}
TARGETS = {
    **{f"sm_{arch}": GPUTarget("cuda", arch, 32) for arch in (80, 90, 100)},
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


@dataclass(frozen=True)
class Variant:
    """One compilation of a kernel. num_terms 0: the loop over any number of terms."""

    family: str
    dtype: str
    num_terms: int
    form: str = "in place"  # or: out, pair, noise, rows
    stochastic: bool = False
    compensated: bool = False

    @property
    def name(self) -> str:
        terms = f"K = {self.num_terms}" if self.num_terms else "K loop"
        rounding = ", stochastic" if self.stochastic else ""
        form = "" if self.form == "in place" else f", {self.form}"
        residuals = ", compensated" if self.compensated else ""
        return f"triton {self.family} {self.dtype}, {terms}{form}{residuals}{rounding}"

    @property
    def num_sides(self) -> int:
        """Sums kept for each element."""
        return launch.num_sides(self.family, self.num_terms, self.form == "pair")


VARIANTS = (
    *(Variant("gaussian", dtype, k) for dtype in ("bf16", "fp32") for k in (0, 1, 2)),
    *(Variant("rademacher", dtype, k) for dtype in ("bf16", "fp32") for k in (0, 1, 2)),
    *(Variant("gaussian", dtype, k) for dtype in ("fp16", "fp64") for k in (0, 1)),
    *(Variant("gaussian", "bf16", k, "pair") for k in (0, 1)),
    *(Variant("gaussian", "bf16", k, "rows") for k in (0, 1)),
    Variant("gaussian", "bf16", 1, stochastic=True),
    Variant("gaussian", "fp16", 1, stochastic=True),
    Variant("gaussian", "fp32", 1, "noise"),
    Variant("rademacher", "fp64", 0),
    Variant("rademacher", "bf16", 0, stochastic=True),
    *(Variant(family, dtype, 1, compensated=True)
      for family in ("gaussian", "rademacher") for dtype in ("bf16", "fp16")),
    *(Variant(family, "bf16", 0, compensated=True) for family in ("gaussian", "rademacher")),
    Variant("gaussian", "bf16", 1, "pair", compensated=True),
    Variant("gaussian", "fp16", 1, "rows", compensated=True),
    Variant("gaussian", "bf16", 1, "out", compensated=True),
    Variant("gaussian", "bf16", 2, stochastic=True),
    *(Variant("gaussian", dtype, 1, "pair") for dtype in ("fp16", "fp32")),
    Variant("rademacher", "bf16", 1, "pair"),
    Variant("rademacher", "bf16", 1, stochastic=True),
)  # fmt: skip


def config_of(variant: Variant) -> launch.Config:
    """The configuration that `launch` picks for a variant."""
    if variant.form == "rows":
        return launch.runs_config()
    dtype = DTYPES[variant.dtype]
    return launch.choose_config(variant.family, dtype, variant.num_terms, variant.num_sides, MANY_TILES)


def compile_variant(variant: Variant, target: GPUTarget) -> Any:
    """Compile one variant for a target with the configuration that `launch` picks; needs no GPU."""
    dtype, config = DTYPES[variant.dtype], config_of(variant)
    kernel = runs_kernel if variant.form == "rows" else segments_kernel
    constants = {
        "FAMILY": variant.family,
        "DTYPE": launch.ELEMENT_TYPES[dtype],
        "ARITHMETIC": tl.float64 if variant.dtype == "fp64" else tl.float32,
        "NUM_TERMS": variant.num_terms,
        "NUM_SIDES": variant.num_sides,
        "HAS_INPUT": variant.form != "noise",
        "HAS_ROWS": variant.form == "rows",
        "PAIR": variant.form == "pair",
        "STOCHASTIC": variant.stochastic,
        "RESIDUALS": launch.residuals_use(variant.compensated, variant.form == "in place"),
        "NUM_LANES": config.num_lanes,
        "BLOCK": config.block,
        "NUM_BLOCKS": config.num_blocks,
        "UNROLL": config.unroll,
        "TILE": config.tile,
    }
    types = {"table": "*i64", "rows": "*i64", "terms": "*i32", "alpha": "fp32"}
    types |= dict.fromkeys(("num_entries", "num_steps", "num_source_rows", "radius_base", "one_bits"), "i32")
    types |= dict.fromkeys(("seed_0", "coeff_bits_0", "seed_1", "coeff_bits_1", "rounding_seed"), "i64")
    names = kernel.arg_names
    source = ASTSource(
        fn=kernel,
        signature={name: types.get(name, "constexpr") for name in names},
        constexprs={name: value for name, value in constants.items() if name in names},
        # What torch's allocations have and a launch finds out.
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in ("table", "terms")},
    )
    options = {"num_warps": config.num_warps(target.warp_size), "enable_fp_fusion": False}
    return triton.compile(source, target=target, options=options)
