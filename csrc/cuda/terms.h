// Terms as the kernels read them, by value or from device memory. NaN and infinite coefficients become zeros.
#pragma once

#include "arguments.h"
#include "target.h"

FK_DEVICE uint64_t term_seed(const TermArguments &terms, int64_t k) {
  return terms.seeds ? terms.seeds[k] : terms.seeds_by_value[k];
}

FK_DEVICE void round_coefficient(double value, float &rounded) { rounded = (float)value; }
FK_DEVICE void round_coefficient(double value, double &rounded) { rounded = value; }
FK_DEVICE bool is_finite(float x) { return (fk_bits_from_float(x) & 0x7F800000u) != 0x7F800000u; }
FK_DEVICE bool is_finite(double x) {
  const uint64_t exponent = (uint64_t)0x7FF << 52;
  return (fk_bits_from_double(x) & exponent) != exponent;
}

// The coefficient of term k rounded to the arithmetic; +0 if the term does not count.
template <typename Family, typename Arithmetic>
FK_DEVICE Arithmetic term_coefficient(const TermArguments &terms, int64_t k, bool &skipped) {
  Arithmetic c;
  round_coefficient(terms.coeffs ? terms.coeffs[k] : terms.coeffs_by_value[k], c);
  skipped = !is_finite(c);
  return skipped || !Family::counts(c) ? (Arithmetic)0 : c;
}

// term_coefficient for the one thread of a block that prepares term k: in the first block of a launch, a NaN or
// infinite one is counted in num_skipped.
template <typename Family, typename Arithmetic>
FK_DEVICE Arithmetic counted_coefficient(const TermArguments &terms, int64_t k) {
  bool skipped;
  const Arithmetic c = term_coefficient<Family, Arithmetic>(terms, k, skipped);
  if (skipped && terms.num_skipped && blockIdx.x == 0) atomicAdd(terms.num_skipped, 1);
  return c;
}

template <typename Arithmetic> FK_DEVICE Arithmetic term_alpha(const TermArguments &terms) {
  return (Arithmetic)(float)(terms.device_alpha ? *terms.device_alpha : terms.alpha);
}

FK_DEVICE uint64_t term_rounding_seed(const TermArguments &terms) {
  return terms.device_rounding_seed ? *terms.device_rounding_seed : terms.rounding_seed;
}
