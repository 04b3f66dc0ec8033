// One 32-bit word -> two standard normals (Box-Muller), in correctly rounded fp32 operations only.
// Frozen as noise contract v1: docs/noise-contract.md section 4 derives each step and constant.
//
//   radius: u = (low 17 bits + 1/2) 2^-17;  s = -2 ln u = E(exponent of u) + Q(mantissa of u)
//           r = sqrt(s) from an integer rsqrt start and one third-order step
//   angle:  theta = pi w 2^-31 (w signed: the top 15 bits are free of the radius), by doubling theta/4:
//           x ~ sin(theta/4), k ~ cos(theta/4), S = x k ~ sqrt(2) sin(theta/2), C = sqrt(2) - x^2
//           z_even = r cos(theta) = r - (r S) S,  z_odd = r sin(theta) = (r S) C
#pragma once

#include "platform.h"

#define FK_RADIUS_MASK 0x0001FFFFu      // 17 radius bits, the low end of the word
#define FK_RADIUS_BASE 0x42800000u      // bits of 64.0f: its last place is 2^-17
#define FK_RADIUS_CENTRE 0x1.fffffep+5f // 64 - 2^-18, so that u is centred in its cell
#define FK_MANTISSA_MASK 0x007FFFFFu
#define FK_ONE_BITS 0x3F800000u      // bits of 1.0f
#define FK_LOG_SLOPE -0x1.62e43p-23f // -2 ln 2 * 2^-23: one binade of u, read from its bit pattern
#define FK_LOG_0 0x1.651828p+7f      // 127 * 2 ln 2 + the constant term of Q
#define FK_LOG_1 -0x1.692664p+2f
#define FK_LOG_2 0x1.3854aep+2f
#define FK_LOG_3 -0x1.1d988cp+1f
#define FK_LOG_4 0x1.2247fep-1f
#define FK_LOG_5 -0x1.f1af44p-5f
#define FK_RSQRT_MAGIC 0xBE3F8000u // (magic - bits) >> 1 starts 0.9 / sqrt(s)
#define FK_SQRT_0 0x1.0d72b4p+1f
#define FK_SQRT_1 -0x1.c48b7ap+0f
#define FK_SQRT_2 0x1.55bb3ap-1f
#define FK_ANGLE_SCALE 0x1p-31f
#define FK_SIN_0 0x1.52249p+0f // 8^(1/4) sin(pi/4 b) / b in t = b^2
#define FK_SIN_1 -0x1.16011ap-3f
#define FK_SIN_2 0x1.0b82a2p-8f
#define FK_COS_0 0x1.ae89f8p+0f // 8^(1/4) cos(pi/4 b) in t = b^2
#define FK_COS_1 -0x1.0993cep-1f
#define FK_COS_2 0x1.b4bcf4p-6f
#define FK_COS_3 -0x1.192f62p-11f
#define FK_SQRT2 0x1.6a09e6p+0f

struct fk_normal_pair {
  float even; // r cos(theta): element 8 group + 2 j
  float odd;  // r sin(theta): element 8 group + 2 j + 1
};

FK_HD float fk_normal_radius(uint32_t word) {
  const float u = fk_float_from_bits(fk_and_or(word, FK_RADIUS_MASK, FK_RADIUS_BASE)) - FK_RADIUS_CENTRE;
  const uint32_t bits = fk_bits_from_float(u);
  const float m = fk_float_from_bits(fk_and_or(bits, FK_MANTISSA_MASK, FK_ONE_BITS));
  const float e = fk_fma((float)(int32_t)bits, FK_LOG_SLOPE, FK_LOG_0);
  float q = fk_fma(FK_LOG_5, m, FK_LOG_4);
  q = fk_fma(q, m, FK_LOG_3);
  q = fk_fma(q, m, FK_LOG_2);
  q = fk_fma(q, m, FK_LOG_1);
  const float s = fk_fma(q, m, e);
  const float y = fk_float_from_bits((FK_RSQRT_MAGIC - fk_bits_from_float(s)) >> 1);
  const float a = s * y;
  const float h = a * y;
  const float p = fk_fma(fk_fma(FK_SQRT_2, h, FK_SQRT_1), h, FK_SQRT_0);
  return a * p;
}

FK_HD fk_normal_pair fk_normal_from_word(uint32_t word) {
  const float r = fk_normal_radius(word);
  const float b = (float)(int32_t)word * FK_ANGLE_SCALE;
  const float t = b * b;
  const float x = fk_fma(fk_fma(FK_SIN_2, t, FK_SIN_1), t, FK_SIN_0) * b;
  const float k = fk_fma(fk_fma(fk_fma(FK_COS_3, t, FK_COS_2), t, FK_COS_1), t, FK_COS_0);
  const float half_sin = x * k;
  const float half_cos = fk_fma(-x, x, FK_SQRT2);
  const float g = r * half_sin;
  fk_normal_pair z;
  z.even = fk_fma(-g, half_sin, r);
  z.odd = g * half_cos;
  return z;
}
