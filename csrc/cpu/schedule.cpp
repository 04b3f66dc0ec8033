#include "schedule.h"

#include <stdlib.h>

// Kernels load keys and coefficients by whole vectors of up to 16 terms.
static int64_t padded(int64_t count) { return (count + 15) / 16 * 16; }

int32_t fk_make_schedules(const fk_terms *terms, int fp64, fk_schedules *out) {
  int64_t count = 0;
  for (int64_t k = 0; k < terms->count; ++k) {
    count += fp64 ? terms->coeffs[k] != 0.0 : (float)terms->coeffs[k] != 0.0f;
  }
  const int64_t room = padded(count);
  const size_t coeff_bytes = fp64 ? sizeof(double) : sizeof(float);
  const size_t key_bytes = sizeof(uint32_t) * (2 * FK_PHILOX_ROUNDS + 2);
  char *memory = (char *)calloc((size_t)room + 1, 2 * coeff_bytes + key_bytes);
  if (memory == 0) return FK_ERROR_MEMORY;

  char *plus_coeffs = memory; // fp64 first: it needs the alignment
  char *minus_coeffs = plus_coeffs + coeff_bytes * (size_t)room;
  uint32_t *key_low = (uint32_t *)(minus_coeffs + coeff_bytes * (size_t)room);
  uint32_t *key_high = key_low + room;
  uint32_t *round_keys = key_high + room;
  int64_t n = 0;
  for (int64_t k = 0; k < terms->count; ++k) {
    const double c = fp64 ? terms->coeffs[k] : (double)(float)terms->coeffs[k];
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
  fk_schedule schedule = {count, round_keys, key_low, key_high, 0, 0};
  out->plus = schedule;
  out->minus = schedule;
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

void fk_free_schedules(fk_schedules *schedules) {
  free(schedules->memory);
  schedules->memory = 0;
}
