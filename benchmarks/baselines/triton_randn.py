"""A baseline: Triton's own generator in a fused kernel. Not our noise, and it changes with the version."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl


@triton.jit
def randn_add(weight: Any, size: Any, seed: Any, scale: Any, block: tl.constexpr) -> None:
    """weight[i] += scale randn(seed, i)."""
    element = tl.program_id(0) * block + tl.arange(0, block)
    inside = element < size
    stored = tl.load(weight + element, mask=inside)
    moved = stored.to(tl.float32) + scale * tl.randn(seed, element)
    tl.store(weight + element, moved.to(stored.dtype), mask=inside)
