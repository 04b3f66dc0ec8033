"""What one run of `benchmarks.drift` measures; it is written into the result."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from benchmarks.common.constants import LEARNING_RATE, ZO_EPS
from benchmarks.models import workloads
from fedkseed import SeedPool


@dataclass(frozen=True)
class DriftSettings:
    """What a run measures; lr and eps are those of the FedKSeed paper."""

    model: str = "smollm2"
    dtypes: tuple[str, ...] = ("bf16", "fp16")
    num_steps: int = 200
    num_points: int = 10
    num_tokens: int = 128
    num_g_steps: int = 6
    num_held_out: int = 16
    lr: float = LEARNING_RATE
    eps: float = ZO_EPS
    base_seed: int = 11

    @property
    def points(self) -> list[int]:
        """The steps after which the distance is taken, evenly spread, the last one among them."""
        return sorted({-(-self.num_steps * k // self.num_points) for k in range(1, self.num_points + 1)})

    @property
    def pool(self) -> SeedPool:
        """Each seed is taken once."""
        return SeedPool(self.base_seed, self.num_steps)

    def load(self, dtype: torch.dtype) -> workloads.Workload:
        """The model in dtype, a row of text for each step, and the held-out rows."""
        return workloads.load(
            self.model,
            dtype,
            num_rows=self.num_steps,
            num_tokens=self.num_tokens,
            num_held_out=self.num_held_out,
        )


#: Seconds, on a random model: a smoke test whose figures mean nothing.
QUICK = DriftSettings(
    model="random-tiny", num_steps=8, num_points=4, num_tokens=32, num_g_steps=2, num_held_out=4, lr=1e-4
)
