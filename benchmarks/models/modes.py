"""The storage modes that the benchmarks of whole steps compare, by the names that their tables use."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fedkseed import Inplace, Streamed

if TYPE_CHECKING:
    from fedkseed.storage import StorageOptions

#: With weights of 16 bits. A forward pass at a time.
ONE_SIDED: dict[str, StorageOptions] = {
    "inplace": Inplace(),
    "inplace, chained": Inplace(chained=True),
    "inplace, stochastic": Inplace(rounding="stochastic"),
    "streamed": Streamed(),
    "streamed, stochastic": Streamed(rounding="stochastic"),
    "streamed, compensated": Streamed(compensated=True),
    "streamed, fp32 forward": Streamed(compute_dtype=torch.float32),
}

#: Both sides in one forward pass of a doubled batch.
PAIRED: dict[str, StorageOptions] = {
    "streamed, paired": Streamed(paired=True),
    "streamed, paired, fp32 forward": Streamed(paired=True, compute_dtype=torch.float32),
    "streamed, paired, compensated, fp32 forward": Streamed(
        paired=True, compensated=True, compute_dtype=torch.float32
    ),
}

_ONLY_16_BIT = ("stochastic", "compensated", "fp32 forward")


def modes(dtype: torch.dtype) -> dict[str, StorageOptions]:
    """All modes that are something of their own with weights of this dtype."""
    return {
        name: options
        for name, options in (ONE_SIDED | PAIRED).items()
        if dtype.itemsize == 2 or not any(part in name for part in _ONLY_16_BIT)
    }


def computes_in_fp32(name: str) -> bool:
    """Whether the mode's forward passes run in fp32 whatever the weights are."""
    return "fp32 forward" in name
