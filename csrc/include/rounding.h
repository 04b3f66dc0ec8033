// fp32 -> bf16 / fp16, to nearest even and stochastically (contract sections 7 and 8), as bit patterns.
// Integer code alone: the same on every device, whatever its flush-to-zero modes.
// NaN stays a quiet NaN of the same sign; its payload is outside the contract.
#pragma once

#include "platform.h"

FK_HD float fk_float_from_bf16(uint16_t h) { return fk_float_from_bits((uint32_t)h << 16); }

FK_HD float fk_float_from_fp16(uint16_t h) {
  const uint32_t sign = (uint32_t)(h & 0x8000u) << 16;
  const uint32_t magnitude = h & 0x7FFFu;
  if (magnitude >= 0x7C00u) { // infinity, NaN
    return fk_float_from_bits(sign | 0x7F800000u | (magnitude & 0x3FFu) << 13);
  }
  if (magnitude >= 0x0400u) { // normal: move the exponent bias from 15 to 127
    return fk_float_from_bits(sign | ((magnitude << 13) + (112u << 23)));
  }
  // subnormal: an integer below 2^10 times 2^-24, exact in fp32
  return fk_float_from_bits(fk_bits_from_float((float)(int32_t)magnitude * 0x1p-24f) | sign);
}

FK_HD uint16_t fk_bf16_nearest(float y) {
  const uint32_t bits = fk_bits_from_float(y);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return (uint16_t)(bits >> 16 | 0x0040u);
  return (uint16_t)((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16);
}

// r: 16 random bits. Added below the kept last bit, then truncated.
FK_HD uint16_t fk_bf16_stochastic(float y, uint32_t r) {
  const uint32_t bits = fk_bits_from_float(y);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return (uint16_t)(bits >> 16 | 0x0040u);
  if ((bits & 0x7FFFFFFFu) == 0x7F800000u) return (uint16_t)(bits >> 16);
  return (uint16_t)((bits + r) >> 16);
}

// Significand (hidden bit included) of a finite fp32 magnitude, and the number of its low bits
// that lie below fp16's last kept place: 13 for results in the normal range, more below 2^-14.
struct fk_fp16_split {
  uint32_t significand;
  uint32_t discarded;
  uint32_t base; // what the kept integer is added to: (exponent field - 1) << 10, or 0 when subnormal
};

FK_HD fk_fp16_split fk_split_for_fp16(uint32_t magnitude) {
  const uint32_t exponent = magnitude >> 23;
  fk_fp16_split out;
  out.significand = exponent ? (magnitude & 0x007FFFFFu) | 0x00800000u : magnitude;
  if (exponent >= 113u) { // at least 2^-14: a normal fp16
    out.discarded = 13u;
    out.base = (exponent - 113u) << 10;
  } else {
    out.discarded = 13u + (113u - (exponent ? exponent : 1u));
    out.base = 0u;
  }
  return out;
}

FK_HD uint16_t fk_fp16_nearest(float y) {
  const uint32_t bits = fk_bits_from_float(y);
  const uint16_t sign = (uint16_t)(bits >> 16 & 0x8000u);
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) return (uint16_t)(sign | 0x7E00u | (magnitude >> 13 & 0x1FFu));
  if (magnitude >= 0x477FF000u) return (uint16_t)(sign | 0x7C00u); // 65520 and above round to infinity
  const fk_fp16_split split = fk_split_for_fp16(magnitude);
  if (split.discarded > 25u) return sign; // below half of the smallest subnormal
  const uint32_t kept = split.significand >> split.discarded;
  const uint32_t rest = split.significand & ((1u << split.discarded) - 1u);
  const uint32_t half = 1u << (split.discarded - 1u);
  const uint32_t up = rest > half || (rest == half && (kept & 1u));
  return (uint16_t)(sign | (split.base + kept + up));
}

FK_HD uint16_t fk_fp16_stochastic(float y, uint32_t r) {
  const uint32_t bits = fk_bits_from_float(y);
  const uint16_t sign = (uint16_t)(bits >> 16 & 0x8000u);
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) return (uint16_t)(sign | 0x7E00u | (magnitude >> 13 & 0x1FFu));
  if (magnitude >= 0x47800000u) return (uint16_t)(sign | 0x7C00u); // 65536 and above
  const fk_fp16_split split = fk_split_for_fp16(magnitude);
  // The kept last place is worth 2^16 here: up to 16 discarded bits, the significand is extended; with more, cut.
  const uint32_t extra = split.discarded - 16u;
  const uint32_t scaled = split.discarded <= 16u ? split.significand << (16u - split.discarded)
                          : extra < 32u          ? split.significand >> extra
                                                 : 0u;
  return (uint16_t)(sign | (split.base + ((scaled + r) >> 16)));
}
