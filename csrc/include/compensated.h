// Compensated weights: a 16-bit weight and its 16-bit residual stand for one fp32 value (contract section 6.5).
// Integer code, and for fp16 three operations that are exact or rounded once: the same on every device.
#pragma once

#include "rounding.h"

typedef struct fk_compensated {
  uint16_t weight;
  int16_t residual;
} fk_compensated;

// An fp32 in two halves, the upper one rounded.
FK_HD float fk_bf16_value(uint16_t weight, int16_t residual) {
  return fk_float_from_bits(((uint32_t)weight << 16) + (uint32_t)(int32_t)residual);
}

FK_HD fk_compensated fk_bf16_split(float y) {
  const uint32_t bits = fk_bits_from_float(y);
  fk_compensated out;
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) {
    out.weight = (uint16_t)(bits >> 16 | 0x7FC0u);
    out.residual = 0;
  } else {
    out.weight = (uint16_t)((bits + 0x8000u) >> 16);
    out.residual = (int16_t)(uint16_t)bits;
  }
  return out;
}

// E + 15, with 2^E <= |weight| < 2^(E + 1), and E = -14 for subnormals, infinities and NaN.
FK_HD uint32_t fk_fp16_exponent(uint16_t weight) {
  const uint32_t field = weight >> 10 & 31u;
  return field == 0u || field == 31u ? 1u : field;
}

FK_HD float fk_fp16_value(uint16_t weight, int16_t residual) {
  const float unit = fk_float_from_bits((fk_fp16_exponent(weight) + 87u) << 23); // 2^(E - 25)
  return fk_fma((float)residual, unit, fk_float_from_fp16(weight));
}

FK_HD fk_compensated fk_fp16_split(float y) {
  fk_compensated out;
  out.weight = fk_fp16_nearest(y);
  if ((out.weight & 0x7C00u) == 0x7C00u) {
    out.residual = 0;
    return out;
  }
  const float per_unit = fk_float_from_bits((167u - fk_fp16_exponent(out.weight)) << 23); // 2^(25 - E)
  const float rest = (y - fk_float_from_fp16(out.weight)) * per_unit; // both exact, at most 2^14
  // Added to 1.5 2^23, whose last place is 1, it is rounded to an integer, ties to even.
  out.residual = (int16_t)(int32_t)(fk_bits_from_float(rest + 0x1.8p+23f) - 0x4B400000u);
  return out;
}
