// Rademacher noise: one bit for each element, 128 elements from one Philox call (contract section 5).
#pragma once

#include "platform.h"

// 1 if z of an element is -1, 0 if it is 1. words: those of its group; lane in [0, 128): its place in the group.
FK_HD uint32_t fk_rademacher_bit(const uint32_t words[4], uint32_t lane) {
  return words[lane >> 5] >> (lane & 31u) & 1u;
}

FK_HD uint32_t fk_rademacher_sign(const uint32_t words[4], uint32_t lane) {
  return fk_rademacher_bit(words, lane) << 31;
}

FK_HD float fk_rademacher(const uint32_t words[4], uint32_t lane) {
  return fk_float_from_bits(fk_rademacher_sign(words, lane) | 0x3F800000u);
}
