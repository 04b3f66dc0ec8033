"""Stochastic rounding: unbiased for every fraction, and independent of the noise of the same seed value."""

from __future__ import annotations

from dataclasses import dataclass

import bit_checks
import numpy as np
import pytest
import torch
from noise_samples import SEED, gaussian
from numpy.typing import NDArray
from thresholds import Check, Judge, from_binomial

import fedkseed_kernels

NUM = 1 << 22
# Kept significand bits without the hidden one, and the smallest normal exponent.
FORMATS = {torch.bfloat16: (7, -126), torch.float16: (10, -14)}


@dataclass(frozen=True)
class Decisions:
    """What stochastic rounding decided for each y: away from zero (up) or towards it."""

    up: NDArray[np.bool_]
    probability: NDArray[np.float64]


def decisions(y: torch.Tensor, rounded: torch.Tensor) -> Decisions:
    """Compare fp32 y with its rounding to bf16 or fp16.

    |y| in units of the last kept place is an integer plus a fraction; up adds 1. The contract gives up the
    probability fraction, cut to 2^-16 (which only fp16 subnormals have finer).
    """
    bits, smallest = FORMATS[rounded.dtype]
    magnitude = np.abs(y.double().numpy())
    exponent = np.maximum(np.frexp(magnitude)[1] - 1, smallest)
    scaled = np.ldexp(magnitude, bits - exponent)
    below = np.floor(scaled)
    step = np.ldexp(np.abs(rounded.double().numpy()), bits - exponent) - below
    assert np.isin(step, (0.0, 1.0)).all(), "expected one of the two neighbours of y"
    return Decisions(step == 1.0, np.floor((scaled - below) * 65536.0) / 65536.0)


def perturbed(dtype: torch.dtype, scale: float, rounding_seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """w + 1e-3 scale z(SEED) of weights of the given scale: exact in fp32, and rounded stochastically to
    dtype.
    """
    torch_random = torch.Generator().manual_seed(3)
    weights = (torch.randn(NUM, generator=torch_random) * scale).to(dtype)
    seeds, coeffs = [SEED], [1e-3 * scale]
    (exact,) = fedkseed_kernels.seed_axpy([weights.float()], seeds, coeffs)
    (rounded,) = fedkseed_kernels.seed_axpy(
        [weights], seeds, coeffs, rounding="stochastic", rounding_seed=rounding_seed
    )
    return exact, rounded


# fp16 weights of scale 1e-5 are subnormal, most of them.
@pytest.mark.parametrize(
    ("dtype", "scale"), [(torch.bfloat16, 0.02), (torch.float16, 0.02), (torch.float16, 1e-5)], ids=str
)
def test_unbiased_and_independent_of_the_noise(judge: Judge, dtype: torch.dtype, scale: float) -> None:
    """The rounding seed equals the noise's seed: only the tag separates their words."""
    exact, rounded = perturbed(dtype, scale, rounding_seed=SEED)
    seen = decisions(exact, rounded)
    z = gaussian(NUM, SEED).astype(np.float64)
    y = exact.double().numpy()
    factors = {"1": np.ones(NUM), "sign y": np.sign(y), "z": z, "z^2 - 1": z * z - 1.0, "|z|": np.abs(z)}
    # Element 2 j shares its word with 2 j + 1: z of the neighbour comes from the same bits if tags were
    # mixed up.
    factors["z of the other half"] = z.reshape(-1, 2)[:, ::-1].ravel()
    judge(
        f"rounding to {str(dtype).removeprefix('torch.')}, scale {scale:g}",
        bit_checks.rounding_up("up", seen.up, seen.probability, factors),
    )


def test_fractions_have_their_probability(judge: Judge) -> None:
    """y = alpha w with w = 1: the same fraction in every element, from one 65536th to all but one."""
    checks: list[Check] = []
    for dtype, (bits, _) in FORMATS.items():
        ones = torch.ones(NUM, dtype=dtype)
        finest = 2.0 ** -min(16, 23 - bits)
        for fraction in (finest, 0.25, 0.5, 1.0 - 2.0**-7, 1.0 - finest):
            alpha = 1.0 + fraction * 2.0**-bits
            (rounded,) = fedkseed_kernels.seed_axpy(
                [ones], [], [], alpha=alpha, rounding="stochastic", rounding_seed=12
            )
            up = decisions(torch.full((NUM,), alpha), rounded).up
            checks.append(
                from_binomial(f"{dtype} fraction {fraction:g}", np.count_nonzero(up), NUM, fraction)
            )
    judge("fractions rounded up", checks)


def half_up(rounding_seed: int, num_tensors: int = 1) -> list[NDArray[np.float32]]:
    """Signs +1 where 1 + 2^-8, half way between two bf16, went up: one array a stream."""
    ones = [torch.ones(1 << 19, dtype=torch.bfloat16) for _ in range(num_tensors)]
    results = fedkseed_kernels.seed_axpy(
        ones, [], [], alpha=1.0 + 2.0**-8, rounding="stochastic", rounding_seed=rounding_seed
    )
    return [np.where((rounded > 1.0).numpy(), 1.0, -1.0).astype(np.float32) for rounded in results]


def test_rounding_seeds_and_streams_are_independent(judge: Judge) -> None:
    """Decisions at probability 1/2 of rounding seeds that differ in one bit, and of 16 streams."""
    (base,) = half_up(0)
    streams = half_up(0, num_tensors=16)
    assert np.array_equal(streams[0], base)
    judge(
        "rounding seeds and streams",
        [
            *bit_checks.sign_pairs("seed bit", base, (half_up(1 << bit)[0] for bit in range(64))),
            *bit_checks.sign_pairs("streams", base, streams[1:]),
        ],
    )
