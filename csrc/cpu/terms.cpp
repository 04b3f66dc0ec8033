#include "terms.h"

#include <stdlib.h>

#include "integer_sums.h"

namespace {

// Number of terms that arrays have room for: kernels load keys and coefficients in whole vectors of up to 16 terms.
int64_t padded(int64_t count) { return (count + 15) / 16 * 16; }

// The coefficient of term k in the class's arithmetic; 0 for a term that does not count.
double counted(const fk_terms *terms, int64_t k, int fp64) {
  const double c = fp64 ? terms->coeffs[k] : (double)(float)terms->coeffs[k];
  if (terms->family == FK_GAUSSIAN) return c;
  return (fp64 ? fk_sum_counts64(c) : fk_sum_counts((float)c)) ? c : 0.0;
}

// Fills the lookups of the fp32 class; returns the scale.
double fill_lookups(int32_t *lookups, const float *coeffs, int64_t count, double largest,
                    int64_t lookup_terms) {
  const int32_t shift = fk_sum_shift(count, (float)largest);
  for (int64_t k = 0; k < count; ++k) {
    const int32_t q = fk_sum_term(coeffs[k], shift);
    int32_t *table = lookups + (k / lookup_terms << lookup_terms);
    for (int64_t m = 0; m < (int64_t)1 << lookup_terms; ++m) {
      table[m] += m >> k % lookup_terms & 1 ? -q : q;
    }
  }
  return fk_sum_scale(shift);
}

// Fills the integers of the fp64 class; returns the scale.
double fill_integers64(int64_t *integers, const double *coeffs, int64_t count, double largest) {
  const int32_t shift = fk_sum_shift64(count, largest);
  for (int64_t k = 0; k < count; ++k) integers[k] = fk_sum_term64(coeffs[k], shift);
  return fk_sum_scale64(shift);
}

} // namespace

int32_t fk_make_ready_terms(const fk_terms *terms, int fp64, int64_t lookup_terms, fk_ready_sides *out) {
  int64_t count = 0;
  double largest = 0.0;
  for (int64_t k = 0; k < terms->count; ++k) {
    const double c = counted(terms, k, fp64), magnitude = c < 0.0 ? -c : c;
    count += c != 0.0;
    if (magnitude > largest) largest = magnitude;
  }
  const int64_t room = padded(count);
  const size_t coeff_bytes = fp64 ? sizeof(double) : sizeof(float);
  const size_t key_bytes = sizeof(uint32_t) * (2 * FK_PHILOX_ROUNDS + 2);
  const size_t integer_bytes = terms->family == FK_GAUSSIAN ? 0
                               : fp64 ? sizeof(int64_t)
                                      : (sizeof(int32_t) << lookup_terms) / (size_t)lookup_terms;
  char *memory = (char *)calloc((size_t)room + 1, 2 * coeff_bytes + integer_bytes + key_bytes);
  if (memory == 0) return FK_ERROR_MEMORY;

  char *plus_coeffs = memory; // fp64 first: it needs the alignment
  char *minus_coeffs = plus_coeffs + coeff_bytes * (size_t)room;
  char *integers = minus_coeffs + coeff_bytes * (size_t)room;
  uint32_t *key_low = (uint32_t *)(integers + integer_bytes * (size_t)room);
  uint32_t *key_high = key_low + room;
  uint32_t *round_keys = key_high + room;
  int64_t n = 0;
  for (int64_t k = 0; k < terms->count; ++k) {
    const double c = counted(terms, k, fp64);
    if (c == 0.0) continue;
    if (fp64) {
      ((double *)plus_coeffs)[n] = c;
      ((double *)minus_coeffs)[n] = -c;
    } else {
      ((float *)plus_coeffs)[n] = (float)c;
      ((float *)minus_coeffs)[n] = (float)-c;
    }
    key_low[n] = (uint32_t)terms->seeds[k];
    key_high[n] = (uint32_t)(terms->seeds[k] >> 32);
    fk_fill_round_keys(terms->seeds[k], round_keys + 2 * FK_PHILOX_ROUNDS * n);
    ++n;
  }
  fk_ready_terms ready = {count, round_keys, key_low, key_high, 0, 0, 0, 0, 0.0};
  if (terms->family == FK_RADEMACHER && count > 0) {
    if (fp64) {
      ready.integers64 = (const int64_t *)integers;
      ready.scale = fill_integers64((int64_t *)integers, (const double *)plus_coeffs, count, largest);
    } else {
      ready.lookups = (const int32_t *)integers;
      ready.scale =
          fill_lookups((int32_t *)integers, (const float *)plus_coeffs, count, largest, lookup_terms);
    }
  }
  out->plus = ready;
  out->minus = ready;
  if (fp64) {
    out->plus.coeffs64 = (const double *)plus_coeffs;
    out->minus.coeffs64 = (const double *)minus_coeffs;
  } else {
    out->plus.coeffs = (const float *)plus_coeffs;
    out->minus.coeffs = (const float *)minus_coeffs;
  }
  out->memory = memory;
  return 0;
}

void fk_free_ready_terms(fk_ready_sides *sides) {
  free(sides->memory);
  sides->memory = 0;
}
