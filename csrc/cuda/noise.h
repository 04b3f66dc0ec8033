// Noise of one octet: the elements 8 n .. 8 n + 7, for one n. There are two ways to the same words:
//   folded: seed, stream and the high half of the group are the same in a whole tile, so what Philox's first rounds
//           make of these alone is computed once a tile and shared (FoldedKeys);
//   direct: nothing is shared (fk_group_words).
#pragma once

#include "integer_sums.h"
#include "normal.h"
#include "philox4x32.h"
#include "rademacher.h"
#include "target.h"

constexpr int kOctetShift = 3;
constexpr int kOctet = 1 << kOctetShift;

struct Gaussian {
  static constexpr uint32_t kTag = FK_TAG_GAUSSIAN;
  static constexpr int kGroupShift = FK_GAUSSIAN_GROUP_SHIFT;
  template <typename Arithmetic> FK_DEVICE static bool counts(Arithmetic c) { return c != (Arithmetic)0; }
};

struct Rademacher {
  static constexpr uint32_t kTag = FK_TAG_RADEMACHER;
  static constexpr int kGroupShift = FK_RADEMACHER_GROUP_SHIFT;
  FK_DEVICE static bool counts(float c) { return fk_sum_counts(c); }
  FK_DEVICE static bool counts(double c) { return fk_sum_counts64(c); }
};

// Words 0..18: round keys of one seed with the constant parts of the counter folded in. Word 19 is free, for an fp32
// coefficient. Aligned for 16-byte loads.
struct alignas(16) FoldedKeys {
  uint32_t w[20];
};

// counter = (any, stream, group_high, tag)
FK_DEVICE void fold_keys(FoldedKeys &keys, uint64_t seed, uint32_t stream, uint32_t group_high,
                         uint32_t tag) {
  uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
  const uint64_t high_product = (uint64_t)FK_PHILOX_M1 * group_high;
  const uint32_t x0 = (uint32_t)(high_product >> 32) ^ stream ^ k0; // word 0 after the first round
  const uint64_t x0_product = (uint64_t)FK_PHILOX_M0 * x0;
  keys.w[0] = tag ^ k1;
  k0 += FK_PHILOX_W0;
  k1 += FK_PHILOX_W1;
  keys.w[1] = (uint32_t)high_product ^ k0;
  keys.w[2] = (uint32_t)(x0_product >> 32) ^ k1;
  k0 += FK_PHILOX_W0;
  k1 += FK_PHILOX_W1;
  keys.w[3] = k0;
  keys.w[4] = (uint32_t)x0_product ^ k1;
#pragma unroll
  for (int round = 3; round < FK_PHILOX_ROUNDS; ++round) {
    k0 += FK_PHILOX_W0;
    k1 += FK_PHILOX_W1;
    keys.w[2 * round - 1] = k0;
    keys.w[2 * round] = k1;
  }
}

FK_DEVICE FoldedKeys load_keys(const FoldedKeys &shared) {
  FoldedKeys keys;
#pragma unroll
  for (int i = 0; i < 5; ++i) ((uint4 *)keys.w)[i] = ((const uint4 *)shared.w)[i];
  return keys;
}

FK_DEVICE uint64_t low_product(uint32_t group_low) { return (uint64_t)FK_PHILOX_M0 * group_low; }

// The words of a group. product: low_product of its low half.
FK_DEVICE fk_words folded_philox(uint64_t product, const FoldedKeys &keys) {
  uint32_t x0, x1, x2, x3;
  {
    const uint64_t p1 = (uint64_t)FK_PHILOX_M1 * ((uint32_t)(product >> 32) ^ keys.w[0]);
    x0 = (uint32_t)(p1 >> 32) ^ keys.w[1];
    x1 = (uint32_t)p1;
    x2 = (uint32_t)product ^ keys.w[2];
  }
  {
    const uint64_t p0 = (uint64_t)FK_PHILOX_M0 * x0, p1 = (uint64_t)FK_PHILOX_M1 * x2;
    x0 = (uint32_t)(p1 >> 32) ^ x1 ^ keys.w[3];
    x2 = (uint32_t)(p0 >> 32) ^ keys.w[4];
    x1 = (uint32_t)p1;
    x3 = (uint32_t)p0;
  }
#pragma unroll
  for (int round = 3; round < FK_PHILOX_ROUNDS; ++round) {
    const uint64_t p0 = (uint64_t)FK_PHILOX_M0 * x0, p1 = (uint64_t)FK_PHILOX_M1 * x2;
    x0 = (uint32_t)(p1 >> 32) ^ x1 ^ keys.w[2 * round - 1];
    x2 = (uint32_t)(p0 >> 32) ^ x3 ^ keys.w[2 * round];
    x1 = (uint32_t)p1;
    x3 = (uint32_t)p0;
  }
  const fk_words words = {{x0, x1, x2, x3}};
  return words;
}

// One fma in the arithmetic of acc. z (or a weight) is widened to it, which is exact.
FK_DEVICE void add_product(float &acc, float factor, float z) { acc = fk_fma(factor, z, acc); }
FK_DEVICE void add_product(double &acc, double factor, double z) { acc = fk_fma64(factor, z, acc); }

template <typename Arithmetic>
FK_DEVICE void add_gaussian(Arithmetic (&acc)[kOctet], const fk_words &words, Arithmetic coefficient) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const fk_normal_pair z = fk_normal_from_word(words.w[j]);
    add_product(acc[2 * j], coefficient, z.even);
    add_product(acc[2 * j + 1], coefficient, z.odd);
  }
}

// The sign bits of an octet, the lowest that of its first element. octet: its index, whose low bits give its place
// within the group.
FK_DEVICE uint32_t octet_signs(const fk_words &words, uint32_t octet) {
  const uint32_t j = octet >> 2 & 3u;
  const uint32_t low = j & 1u ? words.w[1] : words.w[0];
  const uint32_t high = j & 1u ? words.w[3] : words.w[2];
  return (j & 2u ? high : low) >> (8u * (octet & 3u));
}
