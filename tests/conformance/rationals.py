"""Rounding by exact rational arithmetic: slow, and independent of everything in the package."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import NamedTuple


class Format(NamedTuple):
    """A binary floating-point format: significant bits, exponents of the smallest and largest normals."""

    precision: int
    min_exponent: int
    max_exponent: int

    def place(self, magnitude: Fraction) -> Fraction:
        """The unit in the last place at a positive magnitude."""
        exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
        if Fraction(2) ** exponent > magnitude:
            exponent -= 1
        return Fraction(2) ** (max(exponent, self.min_exponent) - self.precision + 1)

    @property
    def largest(self) -> Fraction:
        return (2 - Fraction(2) ** (1 - self.precision)) * Fraction(2) ** self.max_exponent

    def nearest(self, x: Fraction) -> float:
        """x rounded to nearest even; past the largest finite value and half a unit, infinity. 0 gives +0."""
        if x == 0:
            return 0.0
        place = self.place(abs(x))
        magnitude = round(abs(x) / place) * place  # round() of a Fraction goes to even
        return self._signed(magnitude, x < 0)

    def stochastic(self, x: Fraction, random_bits: int) -> float:
        """Contract section 8 for a non-zero x."""
        place = self.place(abs(x))
        in_2_to_minus_16 = abs(x) / place * 2**16
        kept = (math.floor(in_2_to_minus_16) + random_bits) // 2**16
        return self._signed(kept * place, x < 0)

    def _signed(self, magnitude: Fraction, negative: bool) -> float:
        value = float(magnitude) if magnitude <= self.largest else math.inf
        return -value if negative else value


FP64 = Format(53, -1022, 1023)
FP32 = Format(24, -126, 127)
BF16 = Format(8, -126, 127)
FP16 = Format(11, -14, 15)
