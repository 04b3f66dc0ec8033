"""What one benchmark run measures: all that the suites depend on. It is written into the results."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from benchmarks.common.constants import DTYPES


@dataclass(frozen=True)
class Settings:
    """Sizes and repetitions of one run.

    Attributes:
        model: "smollm2" (134,515,008 parameters) or "tiny" (for smoke tests).
        dtype: key of `DTYPES`, the weights' dtype.
        num_threads: threads of torch's pool, which every contestant uses.
        num_rounds: samples of the single-pass suites.
        num_official_seeds: passes timed where a contestant rebuilds seed by seed; their median times K.
        rebuild_seeds: the values of K.
        rademacher_seeds: K of the Rademacher rebuild.
        copy_bytes: size of the buffer whose copy measures the machine's bandwidth.
    """

    model: str = "smollm2"
    dtype: str = "bf16"
    num_threads: int = 2
    num_rounds: int = 9
    num_official_seeds: int = 8
    rebuild_seeds: tuple[int, ...] = (16, 256, 4096)
    rademacher_seeds: int = 4096
    copy_bytes: int = 256 << 20

    def __post_init__(self) -> None:
        if self.model not in ("smollm2", "tiny"):
            raise ValueError(f"expected model smollm2 or tiny, got {self.model!r}")
        if self.dtype not in DTYPES:
            raise ValueError(f"expected dtype {', '.join(DTYPES)}, got {self.dtype!r}")
        counts = (
            self.num_threads,
            self.num_rounds,
            self.num_official_seeds,
            self.rademacher_seeds,
            self.copy_bytes,
        )
        if min(counts + self.rebuild_seeds, default=0) < 1:
            raise ValueError(f"expected every count to be at least 1, got {self}")

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]


#: A few seconds on any machine, for smoke tests. Its timings mean nothing.
QUICK = Settings(
    model="tiny",
    num_rounds=2,
    num_official_seeds=2,
    rebuild_seeds=(2, 5),
    rademacher_seeds=5,
    copy_bytes=1 << 20,
)


def make_settings(*, quick: bool, dtype: str, num_threads: int, seeds: str) -> Settings:
    """Settings from command-line values; seeds lists values of K, separated by commas, "" for the default."""
    settings = replace(QUICK if quick else Settings(), dtype=dtype, num_threads=num_threads)
    if not seeds:
        return settings
    rebuild_seeds = tuple(int(count) for count in seeds.split(","))
    return replace(settings, rebuild_seeds=rebuild_seeds, rademacher_seeds=max(rebuild_seeds))


#: Samples of our own rebuild for a K of this size or more. A sample at K = 4096 takes minutes.
FEW_SAMPLES_FROM = 64
ONE_SAMPLE_FROM = 1024
NUM_FEW_SAMPLES = 3


def num_own_samples(num_seeds: int, num_rounds: int) -> int:
    """How often our own rebuild of num_seeds terms is timed."""
    if num_seeds >= ONE_SAMPLE_FROM:
        return 1
    return min(NUM_FEW_SAMPLES, num_rounds) if num_seeds >= FEW_SAMPLES_FROM else num_rounds
