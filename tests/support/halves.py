"""Support for tests of a step in two halves: storage modes, a model, closures over its batches."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedkseed import ZOSGD, Inplace, SeedPool, Streamed
from fedkseed.storage import StorageOptions
from support.small_model import make_model

MODES: dict[str, StorageOptions] = {
    "in place": Inplace(),
    "in place, stochastic": Inplace(rounding="stochastic"),
    "chained": Inplace(chained=True),
    "streamed": Streamed(),
    "streamed in fp32": Streamed(compute_dtype=torch.float32),
    "streamed, stochastic": Streamed(rounding="stochastic"),
    "compensated": Streamed(compensated=True),
    "paired": Streamed(paired=True),
    "paired, compensated in fp32": Streamed(paired=True, compensated=True, compute_dtype=torch.float32),
}
all_modes = pytest.mark.parametrize("storage", MODES.values(), ids=MODES)
#: Of each mode all but the update's rounding leaves the stored weights alone.
streamed_modes = pytest.mark.parametrize(
    "storage", [mode for name, mode in MODES.items() if isinstance(mode, Streamed)], ids=repr
)
DTYPES = [torch.float64, torch.float32, torch.bfloat16]
all_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
EPS, SEED = float(np.float32(1e-2)), 5
POOL = SeedPool(SEED, 64)


class Batches:
    """Closures over batch number i of a model, and their losses."""

    def __init__(self, model: nn.Module, storage: StorageOptions) -> None:
        self.model = model
        self.is_paired = getattr(storage, "paired", False)
        generator = torch.Generator().manual_seed(4)
        self.inputs = torch.randn(3, 12, 5, generator=generator, dtype=torch.float64)

    def __call__(self, number: int) -> Callable[[], Any]:
        return lambda: self.losses([(number, 1.0)])

    def mean(self, *weighted: tuple[int, float]) -> Callable[[], Any]:
        """The weighted mean over batches, added in their order and divided once."""
        return lambda: self.losses(weighted)

    def losses(self, weighted: Any) -> Any:
        dtype = next(self.model.parameters()).dtype
        sums = [0.0, 0.0]
        for number, weight in weighted:
            x = self.inputs[number].to(dtype)
            y = (self.model(torch.cat([x, x]) if self.is_paired else x).double() - 1).square()
            for side, half in enumerate(y.chunk(2) if self.is_paired else [y]):
                sums[side] += weight * float(half.mean())
        total = math.fsum(weight for _, weight in weighted)
        return tuple(s / total for s in sums) if self.is_paired else sums[0] / total


def made(
    storage: StorageOptions, dtype: torch.dtype = torch.float64, **options: Any
) -> tuple[nn.Module, Batches, ZOSGD]:
    model = make_model(dtype)
    optimizer = ZOSGD(model, 0.05, EPS, seed=SEED, storage=storage, **options)
    return model, Batches(model, storage), optimizer


def near(dtype: torch.dtype) -> float:
    """Rounding of some passes over weights of order 1."""
    return 8 * torch.finfo(dtype).eps
