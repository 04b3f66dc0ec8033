// Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC'11),
// and how the noise contract fills its key and counter (docs/noise-contract.md, sections 2 and 3).
// tests/conformance holds it to the known-answer vectors of Random123.
#pragma once

#include "platform.h"

#define FK_PHILOX_ROUNDS 10
#define FK_PHILOX_M0 0xD2511F53u
#define FK_PHILOX_M1 0xCD9E8D57u
#define FK_PHILOX_W0 0x9E3779B9u
#define FK_PHILOX_W1 0xBB67AE85u

// The tag, word 3 of the counter, says what the words are for. Values are part of the contract.
#define FK_TAG_GAUSSIAN 1u
#define FK_TAG_RADEMACHER 2u
#define FK_TAG_ROUNDING 3u
#define FK_TAG_DERIVED 4u

// A group is the elements whose noise comes from one Philox call; element >> shift is its number. The groups of
// Gaussian noise and of random bits for rounding are octets (8 elements); one of Rademacher noise has 128 elements.
#define FK_GAUSSIAN_GROUP_SHIFT 3
#define FK_RADEMACHER_GROUP_SHIFT 7
#define FK_ROUNDING_GROUP_SHIFT 3

struct fk_words {
  uint32_t w[4];
};

// counter and key words in Random123's order; round r uses key + r * (W0, W1) mod 2^32.
FK_HD fk_words fk_philox4x32_10(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0,
                                uint32_t k1) {
  for (int round = 0; round < FK_PHILOX_ROUNDS; ++round) {
    const uint64_t p0 = (uint64_t)FK_PHILOX_M0 * c0;
    const uint64_t p1 = (uint64_t)FK_PHILOX_M1 * c2;
    const uint32_t n0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0;
    const uint32_t n2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
    c1 = (uint32_t)p1;
    c3 = (uint32_t)p0;
    c0 = n0;
    c2 = n2;
    k0 += FK_PHILOX_W0;
    k1 += FK_PHILOX_W1;
  }
  fk_words out = {{c0, c1, c2, c3}};
  return out;
}

// The four words of one group: key = seed, counter = (group low, stream, group high, tag).
FK_HD fk_words fk_group_words(uint64_t seed, uint32_t stream, uint64_t group, uint32_t tag) {
  return fk_philox4x32_10((uint32_t)group, stream, (uint32_t)(group >> 32), tag, (uint32_t)seed,
                          (uint32_t)(seed >> 32));
}
