// Sums of Rademacher noise (contract section 6.3): integers q that share an exponent. A block finds the exponent from
// all terms before it adds any.
#pragma once

#include "integer_sums.h"
#include "noise.h"
#include "terms.h"

template <typename Arithmetic> struct Integers;
template <> struct Integers<float> {
  using Type = int32_t;
  using Unsigned = uint32_t;
};
template <> struct Integers<double> {
  using Type = int64_t;
  using Unsigned = uint64_t;
};

FK_DEVICE uint32_t magnitude_bits(float x) { return fk_bits_from_float(x) & 0x7FFFFFFFu; }
FK_DEVICE uint64_t magnitude_bits(double x) { return fk_bits_from_double(x) & ~((uint64_t)1 << 63); }

// A survey of the terms that count: how many, and the bits of the largest magnitude.
template <typename Arithmetic> struct TermSurvey {
  typename Integers<Arithmetic>::Unsigned largest;
  uint32_t num_terms;
};

FK_DEVICE void keep_largest(uint32_t &largest, uint32_t value) { atomicMax(&largest, value); }
FK_DEVICE void keep_largest(uint64_t &largest, uint64_t value) {
  atomicMax((unsigned long long *)&largest, (unsigned long long)value);
}

// Called by all kBlockThreads threads of a block. The survey must be cleared before a barrier, and is complete after
// the next one.
template <int kBlockThreads, typename Arithmetic>
FK_DEVICE void survey_terms(const TermArguments &terms, TermSurvey<Arithmetic> &survey) {
  TermSurvey<Arithmetic> own = {};
  for (int64_t k = threadIdx.x; k < terms.count; k += kBlockThreads) {
    const Arithmetic c = counted_coefficient<Rademacher, Arithmetic>(terms, k);
    const typename Integers<Arithmetic>::Unsigned magnitude = magnitude_bits(c);
    own.num_terms += magnitude != 0;
    own.largest = magnitude > own.largest ? magnitude : own.largest;
  }
  if (own.num_terms) {
    keep_largest(survey.largest, own.largest);
    atomicAdd(&survey.num_terms, own.num_terms);
  }
}

// s and 2^-s. If no term counts, any s will do.
template <typename Arithmetic> struct TermScale {
  int32_t shift;
  Arithmetic unit;
};

FK_DEVICE TermScale<float> scale_of(const TermSurvey<float> &survey) {
  const int32_t shift = fk_sum_shift(survey.num_terms, fk_float_from_bits(survey.largest));
  return {shift, fk_sum_scale(shift)};
}

FK_DEVICE TermScale<double> scale_of(const TermSurvey<double> &survey) {
  const int32_t shift = fk_sum_shift64(survey.num_terms, fk_double_from_bits(survey.largest));
  return {shift, fk_sum_scale64(shift)};
}

// q; 0 for a skipped coefficient, which term_coefficient gives as +0.
FK_DEVICE int32_t scaled_coefficient(float c, const TermScale<float> &scale) {
  return c == 0.0f ? 0 : fk_sum_term(c, scale.shift);
}
FK_DEVICE int64_t scaled_coefficient(double c, const TermScale<double> &scale) {
  return c == 0.0 ? 0 : fk_sum_term64(c, scale.shift);
}

FK_DEVICE float unscaled_sum(int32_t sum, const TermScale<float> &scale) {
  return fk_sum_value(sum, scale.unit);
}
FK_DEVICE double unscaled_sum(int64_t sum, const TermScale<double> &scale) {
  return fk_sum_value64(sum, scale.unit);
}
