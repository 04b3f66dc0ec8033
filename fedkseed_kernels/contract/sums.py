"""Terms of a sum of noises as the contract takes them: which count, and the integers of Rademacher sums."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from fedkseed_kernels.contract.arithmetic import ieee_arithmetic

# Section 6.3, for fp32 and for fp64 arithmetic.
SUM_MAX_TERMS = 2**24
SUM_BITS = {False: 30, True: 62}
SUM_SMALLEST = {False: 2.0**-96, True: 2.0**-960}


def kept_terms(
    seeds: Sequence[int], coeffs: Any, fp64: bool, family: str = "gaussian"
) -> list[tuple[int, Any]]:
    """Sections 6.1, 6.3: the (seed, coefficient) pairs that count, coefficients rounded once to fp32 or fp64.

    Raises:
        ValueError: lengths differ, more than 2^24 terms of Rademacher noise, or a coefficient is NaN or
            infinite after rounding.
    """
    with ieee_arithmetic():
        rounded = np.asarray(coeffs, dtype=np.float64).reshape(-1).astype(np.float64 if fp64 else np.float32)
        # Under flush-to-zero these comparisons would drop subnormal coefficients.
        counts = np.abs(rounded) >= SUM_SMALLEST[fp64] if family == "rademacher" else rounded != 0
    if len(seeds) != rounded.size:
        got = f"{len(seeds)} seeds and {rounded.size} coefficients"
        raise ValueError(f"expected one coefficient for each seed, got {got}")
    if not np.isfinite(rounded).all():
        first = int(np.flatnonzero(~np.isfinite(rounded))[0])
        got = f"{rounded[first]} at index {first}"
        raise ValueError(f"expected finite coefficients, got {got}; leave such terms out")
    if family == "rademacher" and rounded.size > SUM_MAX_TERMS:
        raise ValueError(f"expected at most 2^24 terms of rademacher noise, got {rounded.size}")
    return [(int(seeds[k]), rounded[k]) for k in range(rounded.size) if counts[k]]


def integer_terms(coeffs: Sequence[Any], fp64: bool) -> tuple[list[int], int]:
    """Section 6.3: the integers q_k of the coefficients that count, at least one, and their shift s."""
    numbers = [float(c) for c in coeffs]
    _, exponent = math.frexp(max(abs(c) for c in numbers))
    shift = SUM_BITS[fp64] - (len(numbers) - 1).bit_length() - exponent
    # ldexp is exact unless the result is subnormal, far below one half; round() goes to even.
    return [round(math.ldexp(c, shift)) for c in numbers], shift
