// The kernels of any CPU: the contract's headers as they are, without vector code. Where the processor has no fma
// instruction the compiler calls libm's exact function (7 to 10 ns an element).
#include "compensated.h"
#include "integer_sums.h"
#include "kernels.h"
#include "normal.h"
#include "rademacher.h"

#include "scalar_paths.inc"

template <typename Acc> static void gaussian(Acc *acc, uint64_t first, int64_t octets, uint32_t stream,
                                             const fk_ready_terms *terms, const Acc *coeffs,
                                             Acc (*fma)(Acc, Acc, Acc)) {
  for (int64_t octet = 0; octet < octets; ++octet, acc += 8) {
    for (int i = 0; i < 8; ++i) acc[i] = (Acc)-0.0;
    for (int64_t k = 0; k < terms->count; ++k) {
      const uint64_t seed = (uint64_t)terms->key_high[k] << 32 | terms->key_low[k];
      const fk_words words = fk_group_words(seed, stream, first + (uint64_t)octet, FK_TAG_GAUSSIAN);
      for (int j = 0; j < 4; ++j) {
        const fk_normal_pair z = fk_normal_from_word(words.w[j]);
        acc[2 * j] = fma(coeffs[k], (Acc)z.even, acc[2 * j]);
        acc[2 * j + 1] = fma(coeffs[k], (Acc)z.odd, acc[2 * j + 1]);
      }
    }
  }
}

static float fma32(float a, float b, float c) { return fk_fma(a, b, c); }
static double fma64(double a, double b, double c) { return fk_fma64(a, b, c); }

static void gaussian_sums(float *acc, uint64_t first, int64_t octets, uint32_t stream,
                          const fk_ready_terms *terms) {
  gaussian<float>(acc, first, octets, stream, terms, terms->coeffs, fma32);
}

static void gaussian_sums64(double *acc, uint64_t first, int64_t octets, uint32_t stream,
                            const fk_ready_terms *terms) {
  gaussian<double>(acc, first, octets, stream, terms, terms->coeffs64, fma64);
}

static void rademacher_sums(float *acc, uint64_t first, int64_t groups, uint32_t stream,
                            const fk_ready_terms *terms) {
  for (int64_t g = 0; g < groups; ++g, acc += 128) {
    int32_t sums[128] = {0};
    for (int64_t k = 0; k < terms->count; ++k) {
      const uint64_t seed = (uint64_t)terms->key_high[k] << 32 | terms->key_low[k];
      const fk_words words = fk_group_words(seed, stream, first + (uint64_t)g, FK_TAG_RADEMACHER);
      const int32_t *either = terms->lookups + 2 * k;
      for (uint32_t lane = 0; lane < 128; ++lane) sums[lane] += either[fk_rademacher_bit(words.w, lane)];
    }
    for (int lane = 0; lane < 128; ++lane) {
      acc[lane] = terms->count ? fk_sum_value(sums[lane], (float)terms->scale) : -0.0f;
    }
  }
}

static void group_words(uint32_t *words, uint64_t first, int64_t groups, uint32_t stream, uint32_t tag,
                        uint64_t key) {
  for (int64_t g = 0; g < groups; ++g) {
    const fk_words w = fk_group_words(key, stream, first + (uint64_t)g, tag);
    for (int j = 0; j < 4; ++j) words[4 * g + j] = w.w[j];
  }
}

static void philox_words(const uint32_t *counters, const uint32_t *keys, uint32_t *out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t *c = counters + 4 * i, *k = keys + 2 * i;
    const fk_words w = fk_philox4x32_10(c[0], c[1], c[2], c[3], k[0], k[1]);
    for (int j = 0; j < 4; ++j) out[4 * i + j] = w.w[j];
  }
}

static void normal_from_words(const uint32_t *words, float *out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const fk_normal_pair z = fk_normal_from_word(words[i]);
    out[2 * i] = z.even;
    out[2 * i + 1] = z.odd;
  }
}

extern const fk_kernels fk_kernels_baseline = {
    1,
    gaussian_sums,
    rademacher_sums,
    gaussian_sums64,
    rademacher_sums64,
    group_words,
    {apply_fp32, apply_bf16_scalar, apply_fp16_scalar, apply_fp64},
    {0, 0, 0, 0},
    {0, 0, 0, 0},
    philox_words,
    normal_from_words,
};
