// Sixteen 32-bit lanes for kernels.inc. Compiled with -march=x86-64-v4 (AVX-512 F, BW, DQ, VL).
#pragma once

#include <immintrin.h>

#include "kernels.h"

#if defined(__GNUC__) && !defined(__clang__)
// gcc before 13 takes the deliberately undefined operand inside its own intrinsics for a mistake (PR 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

namespace { // internal linkage: each instruction set has a Vec of its own

struct Vec {
  static constexpr int kLanes = 16;
  typedef __m512 F;
  typedef __m512i I;

  FK_HD F set_f(float x) { return _mm512_set1_ps(x); }
  FK_HD I set_i(uint32_t x) { return _mm512_set1_epi32((int)x); }
  // Which of 16 consecutive groups a lane works on (lane 4 q + i: group 4 i + q); store_groups relies on it.
  static constexpr uint32_t kGroupOfLane[kLanes] = {0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15};
  FK_HD F load_f(const float *p) { return _mm512_loadu_ps(p); }
  FK_HD I load_i(const uint32_t *p) { return _mm512_loadu_si512(p); }
  FK_HD void store_f(float *p, F v) { _mm512_storeu_ps(p, v); }
  FK_HD void store_i(uint32_t *p, I v) { _mm512_storeu_si512(p, v); }
  FK_HD F as_f(I v) { return _mm512_castsi512_ps(v); }
  FK_HD I as_i(F v) { return _mm512_castps_si512(v); }

  FK_HD F add(F a, F b) { return _mm512_add_ps(a, b); }
  FK_HD F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  FK_HD F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  FK_HD F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  FK_HD F fnma(F a, F b, F c) { return _mm512_fnmadd_ps(a, b, c); } // c - a b, one rounding
  FK_HD F from_int(I v) { return _mm512_cvtepi32_ps(v); }
  FK_HD I add_i(I a, I b) { return _mm512_add_epi32(a, b); }
  FK_HD I sub_i(I a, I b) { return _mm512_sub_epi32(a, b); }
  FK_HD I and_or(I v, I mask, I base) {
    return _mm512_ternarylogic_epi32(v, mask, base, 0xEA);
  } // (v & mask) | base
  template <int n> FK_HD I shift_right(I v) { return _mm512_srli_epi32(v, n); }

  // Philox: products of the low halves of 64-bit lanes; what the high halves hold does not matter.
  FK_HD I multiply(I a, I b) { return _mm512_mul_epu32(a, b); }
  FK_HD I high_half(I v) { return _mm512_srli_epi64(v, 32); }
  FK_HD I xor2(I a, I b) { return _mm512_xor_si512(a, b); }
  FK_HD I xor3(I a, I b, I c) { return _mm512_ternarylogic_epi32(a, b, c, 0x96); }
  FK_HD I join(I even, I odd) { return _mm512_mask_shuffle_epi32(even, 0xAAAA, odd, _MM_PERM_CDAB); }

  // acc[i] holds element i of lane's group; out gets 8 consecutive elements for each of the 16 groups.
  // Two in-lane steps give rows of four elements; with groups dealt to lanes as kGroupOfLane says, one
  // two-source permutation then completes two whole neighbouring groups.
  FK_HD void store_groups(float *out, const F acc[8]) {
    F t[8], u[8];
    for (int i = 0; i < 4; ++i) {
      t[2 * i] = _mm512_unpacklo_ps(acc[2 * i], acc[2 * i + 1]);
      t[2 * i + 1] = _mm512_unpackhi_ps(acc[2 * i], acc[2 * i + 1]);
    }
    for (int half = 0; half < 2; ++half) {
      for (int i = 0; i < 2; ++i) {
        const __m512d lo = _mm512_castps_pd(t[4 * half + i]), hi = _mm512_castps_pd(t[4 * half + 2 + i]);
        u[4 * half + 2 * i] = _mm512_castpd_ps(_mm512_unpacklo_pd(lo, hi));
        u[4 * half + 2 * i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(lo, hi));
      }
    }
    // u[i] (elements 0..3) and u[4 + i] (4..7): 128-bit lane q belongs to group 4 i + q.
    const I front = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const I back = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
    for (int i = 0; i < 4; ++i) {
      store_f(out + 32 * i, _mm512_permutex2var_ps(u[i], front, u[4 + i]));
      store_f(out + 32 * i + 16, _mm512_permutex2var_ps(u[i], back, u[4 + i]));
    }
  }

  // sums of 16 elements each: acc[v] += bit (16 v + lane) of bits set ? -c : c, for v < 2
  static constexpr int kVectorsPerWord = 2;
  FK_HD void add_signed(F *acc, uint32_t bits, float c) {
    const F plus = set_f(c), minus = set_f(-c);
    acc[0] = add(acc[0], _mm512_mask_blend_ps((__mmask16)bits, plus, minus));
    acc[1] = add(acc[1], _mm512_mask_blend_ps((__mmask16)(bits >> 16), plus, minus));
  }

  FK_HD F load_bf16(const uint16_t *p) {
    return as_f(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16));
  }
  FK_HD void store_bf16(uint16_t *p, F y) {
    const I bits = as_i(y);
    const I odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), set_i(1));
    const I nearest = add_i(add_i(bits, set_i(0x7FFF)), odd);
    const I rounded =
        _mm512_mask_or_epi32(nearest, _mm512_cmp_ps_mask(y, y, _CMP_UNORD_Q), bits, set_i(0x00400000u));
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
  }
  FK_HD F load_fp16(const uint16_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
  FK_HD void store_fp16(uint16_t *p, F y) {
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph(y, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
};

} // namespace
