// Rademacher noise: one bit an element, 128 elements a Philox call (contract section 5).
#pragma once

#include "platform.h"

// 1 where z of one element of a group is -1, 0 where it is 1. lane in [0, 128).
FK_HD uint32_t fk_rademacher_bit(const uint32_t words[4], uint32_t lane) {
  return words[lane >> 5] >> (lane & 31u) & 1u;
}

FK_HD uint32_t fk_rademacher_sign(const uint32_t words[4], uint32_t lane) {
  return fk_rademacher_bit(words, lane) << 31;
}

FK_HD float fk_rademacher(const uint32_t words[4], uint32_t lane) {
  return fk_float_from_bits(fk_rademacher_sign(words, lane) | 0x3F800000u);
}
