// Sums of Rademacher noise: integers that share an exponent, exact in any order (contract section 6.3).
// fp32 coefficients sum in int32, fp64 ones in int64. All is integer code but the last two operations of a sum, a
// conversion and a product with a power of two: no library function, and no result that a floating-point mode changes.
#pragma once

#include "platform.h"

#define FK_SUM_MAX_TERMS 0x1000000 // 2^24: with this many terms each still has 7 bits
#define FK_SUM_BITS 30             // no sum is larger than 2^30
#define FK_SUM_BITS64 62
#define FK_SUM_SMALLEST 0x0F800000u             // bits of 2^-96: smaller coefficients are skipped
#define FK_SUM_SMALLEST64 0x03F0000000000000ull // bits of 2^-960

// Whether a term counts. Host coefficients are finite; on a device a NaN or infinity does not count.
FK_HD bool fk_sum_counts(float c) {
  const uint32_t magnitude = fk_bits_from_float(c) & 0x7FFFFFFFu;
  return magnitude >= FK_SUM_SMALLEST && magnitude < 0x7F800000u;
}

FK_HD bool fk_sum_counts64(double c) {
  const uint64_t magnitude = fk_bits_from_double(c) & 0x7FFFFFFFFFFFFFFFull;
  return magnitude >= FK_SUM_SMALLEST64 && magnitude < 0x7FF0000000000000ull;
}

// The least L with n <= 2^L, n >= 1.
FK_HD int32_t fk_sum_log2(int64_t n) {
  int32_t log2 = 0;
  while ((int64_t)1 << log2 < n) ++log2;
  return log2;
}

// s of n >= 1 terms that count. largest: their largest magnitude, 2^(e-1) <= largest < 2^e.
FK_HD int32_t fk_sum_shift(int64_t n, float largest) {
  const int32_t e = (int32_t)(fk_bits_from_float(largest) >> 23 & 0xFFu) - 126;
  return FK_SUM_BITS - fk_sum_log2(n) - e;
}

FK_HD int32_t fk_sum_shift64(int64_t n, double largest) {
  const int32_t e = (int32_t)(fk_bits_from_double(largest) >> 52 & 0x7FFu) - 1022;
  return FK_SUM_BITS64 - fk_sum_log2(n) - e;
}

// q of a coefficient that counts: c 2^s rounded to an integer, ties to even.
FK_HD int32_t fk_sum_term(float c, int32_t s) {
  const uint32_t bits = fk_bits_from_float(c);
  const uint32_t significand = (bits & 0x007FFFFFu) | 0x00800000u;
  const int32_t up = (int32_t)(bits >> 23 & 0xFFu) - 150 + s; // c = significand 2^(exponent - 150)
  uint32_t q;
  if (up >= 0) {
    q = significand << up;
  } else {
    const int32_t down = up < -25 ? 25 : -up; // 25 places and more leave nothing
    q = (significand + ((1u << (down - 1)) - 1u) + (significand >> down & 1u)) >> down;
  }
  return bits >> 31 ? -(int32_t)q : (int32_t)q;
}

FK_HD int64_t fk_sum_term64(double c, int32_t s) {
  const uint64_t bits = fk_bits_from_double(c);
  const uint64_t significand = (bits & 0x000FFFFFFFFFFFFFull) | 0x0010000000000000ull;
  const int32_t up = (int32_t)(bits >> 52 & 0x7FFu) - 1075 + s;
  uint64_t q;
  if (up >= 0) {
    q = significand << up;
  } else {
    const int32_t down = up < -54 ? 54 : -up;
    q = (significand + ((1ull << (down - 1)) - 1ull) + (significand >> down & 1ull)) >> down;
  }
  return bits >> 63 ? -(int64_t)q : (int64_t)q;
}

// 2^-s, always a normal number.
FK_HD float fk_sum_scale(int32_t s) { return fk_float_from_bits((uint32_t)(127 - s) << 23); }

FK_HD double fk_sum_scale64(int32_t s) { return fk_double_from_bits((uint64_t)(1023 - s) << 52); }

// acc, from A, the sum of z q. It is rounded once, in the conversion. A = 0 gives +0.
FK_HD float fk_sum_value(int32_t sum, float scale) { return (float)sum * scale; }

FK_HD double fk_sum_value64(int64_t sum, double scale) { return (double)sum * scale; }
