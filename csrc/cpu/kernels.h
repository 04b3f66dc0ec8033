// The kernels that one instruction set provides, and the sizes of blocks that all of them share.
// The engine (engine.cpp) goes through tensors in blocks; the kernels of a table turn groups of noise into sums and
// apply sums to stored weights. Files of this folder that are compiled for more than the baseline include no C++
// standard header: of an inline function that several objects hold, the linker could keep the copy with AVX code,
// and every processor would run it.
#pragma once

#include "fedkseed.h"
#include "philox4x32.h"

#define FK_MEMBER inline __attribute__((always_inline))

// The most elements of a block: 16 Rademacher groups, whose sums stay in the first-level cache.
#define FK_BLOCK 2048
// Elements that buffers of sums are longer than a block: kernels write whole vectors of groups (16 octets).
#define FK_BLOCK_PAD 128
// Kernels that write sums straight into weights take multiples of this many elements.
#define FK_INTO_MULTIPLE FK_BLOCK_PAD
#define FK_BLOCK_WORDS (FK_BLOCK / 2) // random words for stochastic rounding: one for two elements

// Ready terms: the terms of a call that count, made ready for the kernels of one dtype class (fp64; all others).
typedef struct fk_ready_terms {
  int64_t count;
  const uint32_t *round_keys; // [count][2 * FK_PHILOX_ROUNDS]: k0, k1 of round 0, of round 1, ...
  const uint32_t *key_low;    // [count], padded with zeros to a multiple of 16
  const uint32_t *key_high;   // likewise
  const float *coeffs;        // [count], padded likewise; NULL in the fp64 class
  const double *coeffs64;     // [count]; NULL in the fp32 class
  // Rademacher noise only: the integers q of contract section 6.3. In the fp32 class they are kept as tables of
  // lookup_terms terms each, padded with zeros to 16 terms: entry m of table t is the sum of z q over the terms
  // t lookup_terms + i, with z = -1 where bit i of m is set.
  const int32_t *lookups;
  const int64_t *integers64; // [count]; the integers of the fp64 class
  double scale;              // 2^-s
} fk_ready_terms;

// The arguments of a kernel that computes y = alpha * w + acc (acc alone where in is NULL) for n contiguous
// elements. y is rounded into out; or split into out and residual_out; or stored unrounded, in fp32.
typedef struct fk_apply {
  const void *in;
  void *out;
  void *out_minus;     // of the kernels of *_into, with one term: alpha * w - acc is written too; or NULL
  const float *acc;    // fp32, bf16, fp16
  const double *acc64; // fp64
  const uint16_t *random_bits; // 16 an element, for stochastic rounding; NULL: round to nearest
  int64_t n;
  double alpha;
  const int16_t *residual; // bf16, fp16: w is a compensated weight; or NULL
  int16_t *residual_out;   // may equal residual; or NULL
  int32_t wide;            // bf16, fp16: out and out_minus are fp32; random_bits is not read
} fk_apply;

typedef void (*fk_into_kernel)(const fk_apply *apply, uint64_t first, uint32_t stream,
                               const fk_ready_terms *terms);

typedef struct fk_kernels {
  int64_t lookup_terms; // of the ready terms that rademacher_sums takes: 1, 2 or 4
  // acc of the terms for groups first .. first + groups - 1 of a stream (the groups of Gaussian noise are octets),
  // in element order; -0 where there is no term. May write up to FK_BLOCK_PAD elements past the last group.
  void (*gaussian_sums)(float *acc, uint64_t first, int64_t octets, uint32_t stream,
                        const fk_ready_terms *terms);
  void (*rademacher_sums)(float *acc, uint64_t first, int64_t groups, uint32_t stream,
                          const fk_ready_terms *terms);
  void (*gaussian_sums64)(double *acc, uint64_t first, int64_t octets, uint32_t stream,
                          const fk_ready_terms *terms);
  void (*rademacher_sums64)(double *acc, uint64_t first, int64_t groups, uint32_t stream,
                            const fk_ready_terms *terms);
  // Raw words of consecutive groups, four a group. May write up to 64 words past the last group.
  void (*group_words)(uint32_t *words, uint64_t first, int64_t groups, uint32_t stream, uint32_t tag,
                      uint64_t key);
  void (*apply[4])(const fk_apply *apply); // by fk_dtype
  // Sums and apply in one, straight into the weights and rounded to nearest: acc and random_bits are not read, n is
  // a multiple of FK_INTO_MULTIPLE and in is not NULL. By fk_dtype; NULL where there is none.
  fk_into_kernel gaussian_into[4];
  fk_into_kernel rademacher_into[4]; // takes one term
  // Test-only: raw Philox words of any counters and keys; the Gaussian transform of any words.
  void (*philox_words)(const uint32_t *counters, const uint32_t *keys, uint32_t *out, int64_t count);
  void (*normal_from_words)(const uint32_t *words, float *out, int64_t count);
} fk_kernels;

extern const fk_kernels fk_kernels_baseline;
#if defined(FK_HAVE_AVX2)
extern const fk_kernels fk_kernels_avx2;
#endif
#if defined(FK_HAVE_AVX512)
extern const fk_kernels fk_kernels_avx512;
#endif

FK_HD void fk_fill_round_keys(uint64_t seed, uint32_t *round_keys) {
  uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
  for (int round = 0; round < FK_PHILOX_ROUNDS; ++round) {
    round_keys[2 * round] = k0;
    round_keys[2 * round + 1] = k1;
    k0 += FK_PHILOX_W0;
    k1 += FK_PHILOX_W1;
  }
}
