// Compensated weights: a 16-bit weight and its 16-bit residual stand for one fp32 value (contract section 6.5).
// Integer code, and for fp16 three operations that are exact or rounded once: the same on every device.
#pragma once

#include "rounding.h"

typedef struct fk_compensated {
  uint16_t weight;
  int16_t residual;
} fk_compensated;

// bf16: the weight and the residual are the two halves of the fp32 value, the upper one rounded.
FK_HD float fk_bf16_value(uint16_t weight, int16_t residual) {
  return fk_float_from_bits(((uint32_t)weight << 16) + (uint32_t)(int32_t)residual);
}

FK_HD fk_compensated fk_bf16_split(float y) {
  // Every NaN becomes one pattern, whose low half is 0: rounding would carry that of others into the sign.
  const uint32_t bits = y == y ? fk_bits_from_float(y) : 0x7FC00000u;
  fk_compensated out;
  out.weight = (uint16_t)((bits + 0x8000u) >> 16);
  out.residual = (int16_t)(uint16_t)bits;
  return out;
}

// Bits of 2^E for an fp16 weight widened to fp32, with 2^E <= |weight| < 2^(E + 1), and E = -14 for subnormals. For
// infinities and NaN the contract takes -14 too; here 2^E is infinite, which gives the same value and residual.
FK_HD uint32_t fk_fp16_exponent(float weight) {
  const uint32_t field = fk_bits_from_float(weight) & 0x7F800000u, least = 113u << 23;
  return field > least ? field : least;
}

// The value of a weight that is widened already, and its residual.
FK_HD float fk_fp16_value_of(float widened, int16_t residual) {
  const float unit = fk_float_from_bits(fk_fp16_exponent(widened) - (25u << 23)); // 2^(E - 25)
  return fk_fma((float)residual, unit, widened);
}

// The residual of y beside the weight that y was rounded to, here widened.
FK_HD int16_t fk_fp16_residual(float y, float widened) {
  const uint32_t exponent = fk_fp16_exponent(widened);
  const float per_unit = fk_float_from_bits((279u << 23) - exponent); // 2^(25 - E)
  const float rest = (y - widened) * per_unit;                        // both operations exact; at most 2^14
  // 1.5 2^23 has last place 1, and its bits end in 16 zeros: adding it rounds rest to an integer, ties to even.
  const uint32_t rounded = fk_bits_from_float(rest + 0x1.8p+23f);
  return (int16_t)(uint16_t)(exponent == 0x7F800000u ? 0u : rounded);
}

FK_HD float fk_fp16_value(uint16_t weight, int16_t residual) {
  return fk_fp16_value_of(fk_float_from_fp16(weight), residual);
}

FK_HD fk_compensated fk_fp16_split(float y) {
  fk_compensated out;
  out.weight = fk_fp16_nearest(y);
  out.residual = fk_fp16_residual(y, fk_float_from_fp16(out.weight));
  return out;
}
