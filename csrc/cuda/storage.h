// How the eight weights of an octet are held, widened and rounded, by dtype. An octet is held in 32-bit registers.
#pragma once

#include "compensated.h"
#include "noise.h"
#include "rounding.h"
#include "target.h"

template <int kWords> struct Registers {
  uint32_t w[kWords];
};

// Two fp32 values as two 16-bit ones in one register, rounded to nearest even: one instruction on a GPU. A NaN stays
// a NaN.
FK_DEVICE uint32_t pack_bf16(float low, float high) {
#if defined(__CUDA_ARCH__)
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
#else
  return fk_bf16_nearest(low) | (uint32_t)fk_bf16_nearest(high) << 16;
#endif
}

FK_DEVICE uint32_t pack_fp16(float low, float high) {
#if defined(__CUDA_ARCH__)
  uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
#else
  return fk_fp16_nearest(low) | (uint32_t)fk_fp16_nearest(high) << 16;
#endif
}

FK_DEVICE float widen_fp16(uint32_t half) {
#if defined(__CUDA_ARCH__)
  float widened;
  asm("{ .reg .b16 low, high; mov.b32 {low, high}, %1; cvt.f32.f16 %0, low; }" : "=f"(widened) : "r"(half));
  return widened;
#else
  return fk_float_from_fp16((uint16_t)half);
#endif
}

struct Fp32 {
  using Arithmetic = float;
  using Element = uint32_t;
  using Octet = Registers<8>;
  static constexpr bool kRounds = false; // and no residuals
  static constexpr Element kNegativeZero = 0x80000000u;
  FK_DEVICE static float widen(const Octet &octet, int i) { return fk_float_from_bits(octet.w[i]); }
  FK_DEVICE static void round_nearest(const float (&y)[kOctet], Octet &octet) {
#pragma unroll
    for (int i = 0; i < kOctet; ++i) octet.w[i] = fk_bits_from_float(y[i]);
  }
  FK_DEVICE static void round_stochastic(const float (&y)[kOctet], const fk_words &, Octet &octet) {
    round_nearest(y, octet);
  }
  FK_DEVICE static Element get(const Octet &octet, int i) { return octet.w[i]; }
  FK_DEVICE static void set(Octet &octet, int i, Element bits) { octet.w[i] = bits; }
};

struct Fp64 {
  using Arithmetic = double;
  using Element = uint64_t;
  using Octet = Registers<16>;
  static constexpr bool kRounds = false;
  static constexpr Element kNegativeZero = (uint64_t)1 << 63;
  FK_DEVICE static double widen(const Octet &octet, int i) { return fk_double_from_bits(get(octet, i)); }
  FK_DEVICE static void round_nearest(const double (&y)[kOctet], Octet &octet) {
#pragma unroll
    for (int i = 0; i < kOctet; ++i) set(octet, i, fk_bits_from_double(y[i]));
  }
  FK_DEVICE static void round_stochastic(const double (&y)[kOctet], const fk_words &, Octet &octet) {
    round_nearest(y, octet);
  }
  FK_DEVICE static Element get(const Octet &octet, int i) {
    return (uint64_t)octet.w[2 * i + 1] << 32 | octet.w[2 * i];
  }
  FK_DEVICE static void set(Octet &octet, int i, Element bits) {
    octet.w[2 * i] = (uint32_t)bits;
    octet.w[2 * i + 1] = (uint32_t)(bits >> 32);
  }
};

struct Half { // two 16-bit numbers a register, the first in the low half
  using Arithmetic = float;
  using Element = uint16_t;
  using Octet = Registers<4>;
  static constexpr bool kRounds = true;
  static constexpr Element kNegativeZero = 0x8000u;
  FK_DEVICE static Element get(const Octet &octet, int i) {
    return (uint16_t)(octet.w[i >> 1] >> (16 * (i & 1)));
  }
  FK_DEVICE static void set(Octet &octet, int i, Element bits) {
    const uint32_t shift = 16u * (i & 1);
    octet.w[i >> 1] = (octet.w[i >> 1] & ~(0xFFFFu << shift)) | (uint32_t)bits << shift;
  }
};

struct Bf16 : Half {
  FK_DEVICE static float value(const Octet &octet, const Octet &residuals, int i) {
    return fk_bf16_value(get(octet, i), (int16_t)get(residuals, i));
  }
  FK_DEVICE static void split(const float (&y)[kOctet], Octet &octet, Octet &residuals) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const fk_compensated low = fk_bf16_split(y[2 * j]), high = fk_bf16_split(y[2 * j + 1]);
      octet.w[j] = low.weight | (uint32_t)high.weight << 16;
      residuals.w[j] = (uint16_t)low.residual | (uint32_t)high.residual << 16;
    }
  }
  FK_DEVICE static float widen(const Octet &octet, int i) {
    return fk_float_from_bits(i & 1 ? octet.w[i >> 1] & 0xFFFF0000u : octet.w[i >> 1] << 16);
  }
  FK_DEVICE static void round_nearest(const float (&y)[kOctet], Octet &octet) {
#pragma unroll
    for (int j = 0; j < 4; ++j) octet.w[j] = pack_bf16(y[2 * j], y[2 * j + 1]);
  }
  FK_DEVICE static void round_stochastic(const float (&y)[kOctet], const fk_words &bits, Octet &octet) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      octet.w[j] = fk_bf16_stochastic(y[2 * j], bits.w[j] & 0xFFFFu) |
                   (uint32_t)fk_bf16_stochastic(y[2 * j + 1], bits.w[j] >> 16) << 16;
    }
  }
};

struct Fp16 : Half {
  FK_DEVICE static float value(const Octet &octet, const Octet &residuals, int i) {
    return fk_fp16_value_of(widen(octet, i), (int16_t)get(residuals, i));
  }
  FK_DEVICE static void split(const float (&y)[kOctet], Octet &octet, Octet &residuals) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      octet.w[j] = pack_fp16(y[2 * j], y[2 * j + 1]);
      residuals.w[j] = (uint16_t)fk_fp16_residual(y[2 * j], widen(octet, 2 * j)) |
                       (uint32_t)(uint16_t)fk_fp16_residual(y[2 * j + 1], widen(octet, 2 * j + 1)) << 16;
    }
  }
  FK_DEVICE static float widen(const Octet &octet, int i) {
    return widen_fp16(i & 1 ? octet.w[i >> 1] >> 16 : octet.w[i >> 1]);
  }
  FK_DEVICE static void round_nearest(const float (&y)[kOctet], Octet &octet) {
#pragma unroll
    for (int j = 0; j < 4; ++j) octet.w[j] = pack_fp16(y[2 * j], y[2 * j + 1]);
  }
  FK_DEVICE static void round_stochastic(const float (&y)[kOctet], const fk_words &bits, Octet &octet) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      octet.w[j] = fk_fp16_stochastic(y[2 * j], bits.w[j] & 0xFFFFu) |
                   (uint32_t)fk_fp16_stochastic(y[2 * j + 1], bits.w[j] >> 16) << 16;
    }
  }
};
