// What one instruction set provides, and the block geometry that all of them share.
// The engine (engine.cpp) walks tensors in blocks; a kernel table turns a block of noise groups into sums
// and applies sums to stored weights. No C++ standard header is included by any file of this folder that
// is compiled for more than the baseline: a weak symbol with AVX code could be kept for everyone.
#pragma once

#include "fedkseed.h"
#include "philox4x32.h"

#define FK_MEMBER inline __attribute__((always_inline))

// Elements a block spans at most. Its sums stay in the first-level cache; 16 Rademacher groups.
#define FK_BLOCK 2048
// Sum buffers are this much longer: kernels work on whole vectors of groups (16 groups of 8 elements).
#define FK_BLOCK_PAD 128
#define FK_INTO_MULTIPLE FK_BLOCK_PAD
#define FK_BLOCK_WORDS (FK_BLOCK / 2) // rounding: one word per two elements

// Terms that do not count removed, in the arithmetic of one dtype class.
typedef struct fk_ready_terms {
  int64_t count;
  const uint32_t *round_keys; // [count][2 * FK_PHILOX_ROUNDS]: k0, k1 of round 0, of round 1, ...
  const uint32_t *key_low;    // [count], padded with zeros to a multiple of 16
  const uint32_t *key_high;   // likewise
  const float *coeffs;        // [count], padded likewise; NULL in the fp64 class
  const double *coeffs64;     // [count]; NULL in the fp32 class
  // Rademacher noise only: the integers q of contract section 6.3, and 2^-s. In the fp32 class they stand as
  // tables of lookup_terms terms each, padded with zeros to 16 terms: entry m of table t is the sum of z q over
  // the table's terms t lookup_terms + i, with z = -1 where bit i of m is set.
  const int32_t *lookups;
  const int64_t *integers64; // [count]
  double scale;
} fk_ready_terms;

// y = alpha * w + acc (or acc alone when in is NULL) for n contiguous elements, rounded into out; or split into
// out and residual_out; or stored as it is, in fp32.
typedef struct fk_apply {
  const void *in;
  void *out;
  void *out_minus;  // of the fused kernels: y = alpha * w - acc as well, from a schedule of one term; or NULL
  const float *acc; // fp32, bf16, fp16
  const double *acc64;         // fp64
  const uint16_t *random_bits; // 16 random bits an element, or NULL for rounding to nearest
  int64_t n;
  double alpha;
  const int16_t *residual; // bf16, fp16: w is a compensated weight; or NULL
  int16_t *residual_out;   // may equal residual; or NULL
  int32_t wide;            // bf16, fp16: out and out_minus are fp32; noise is not read
} fk_apply;

typedef void (*fk_into_kernel)(const fk_apply *apply, uint64_t first, uint32_t stream,
                               const fk_ready_terms *terms);

typedef struct fk_kernels {
  int64_t lookup_terms; // of the Rademacher schedules that rademacher_sums takes: 1, 2 or 4
  // acc of the schedule for groups first .. first + groups - 1 of a stream, in element order; -0 where there is
  // no term. May write up to FK_BLOCK_PAD elements past the last group.
  void (*gaussian_sums)(float *acc, uint64_t first, int64_t groups, uint32_t stream,
                        const fk_ready_terms *terms);
  void (*rademacher_sums)(float *acc, uint64_t first, int64_t groups, uint32_t stream,
                          const fk_ready_terms *terms);
  void (*gaussian_sums64)(double *acc, uint64_t first, int64_t groups, uint32_t stream,
                          const fk_ready_terms *terms);
  void (*rademacher_sums64)(double *acc, uint64_t first, int64_t groups, uint32_t stream,
                            const fk_ready_terms *terms);
  // Raw words of consecutive groups, four a group. May write up to 64 words past the last group.
  void (*group_words)(uint32_t *words, uint64_t first, int64_t groups, uint32_t stream, uint32_t tag,
                      uint64_t key);
  void (*apply[4])(const fk_apply *apply); // by fk_dtype
  // Sums and apply in one, rounded to nearest, without the trip through acc: n is a multiple of FK_INTO_MULTIPLE, in is
  // not NULL, acc and noise are not read. By fk_dtype; NULL where there is none.
  fk_into_kernel gaussian_into[4];
  fk_into_kernel rademacher_into[4]; // from a schedule of one term
  // Test-only: raw Philox words for any counters and keys; the transform of chosen words.
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
