// Sixteen 32-bit lanes for kernels.inc. Compiled with -march=x86-64-v4 (AVX-512 F, BW, DQ, VL).
#pragma once

#include <immintrin.h>

#include "kernels.h"

#if defined(__GNUC__) && !defined(__clang__)
// gcc before 13 warns of the deliberately undefined operand inside its own intrinsics (PR 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

namespace { // internal linkage: Vec is another type for each instruction set

struct Vec {
  static constexpr int kLanes = 16;
  typedef __m512 F;
  typedef __m512i I;

  FK_HD F set_f(float x) { return _mm512_set1_ps(x); }
  FK_HD I set_i(uint32_t x) { return _mm512_set1_epi32((int)x); }
  // Which of 16 consecutive groups a lane works on (lane 4 q + i: group 4 i + q); the transpositions
  // rely on it.
  static constexpr uint32_t kGroupOfLane[kLanes] = {0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15};
  FK_HD F load_f(const float *p) { return _mm512_loadu_ps(p); }
  FK_HD I load_i(const uint32_t *p) { return _mm512_loadu_si512(p); }
  FK_HD void store_f(float *p, F v) { _mm512_storeu_ps(p, v); }
  FK_HD void store_i(uint32_t *p, I v) { _mm512_storeu_si512(p, v); }
  FK_HD F as_f(I v) { return _mm512_castsi512_ps(v); }
  FK_HD I as_i(F v) { return _mm512_castps_si512(v); }

  FK_HD F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  FK_HD F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  FK_HD F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  FK_HD F fms(F a, F b, F c) { return _mm512_fmsub_ps(a, b, c); }
  FK_HD F fnma(F a, F b, F c) { return _mm512_fnmadd_ps(a, b, c); } // c - a b, one rounding
  FK_HD F from_int(I v) { return _mm512_cvtepi32_ps(v); }
  FK_HD I add_i(I a, I b) { return _mm512_add_epi32(a, b); }
  FK_HD I sub_i(I a, I b) { return _mm512_sub_epi32(a, b); }
  FK_HD I max_i(I a, I b) { return _mm512_max_epi32(a, b); } // signed
  FK_HD I and_or(I v, I mask, I base) {
    return _mm512_ternarylogic_epi32(v, mask, base, 0xEA);
  } // (v & mask) | base
  FK_HD I and2(I a, I b) { return _mm512_and_si512(a, b); }
  template <int n> FK_HD I shift_right(I v) { return _mm512_srli_epi32(v, n); }
  template <int n> FK_HD I shift_left(I v) { return _mm512_slli_epi32(v, n); }
  template <int n> FK_HD I shift_right_signed(I v) { return _mm512_srai_epi32(v, n); }
  FK_HD I nearest_int(F v) { return _mm512_cvtps_epi32(v); } // 2^31 for NaN and out of range
  FK_HD F quiet(F v) { // v, with every NaN made one pattern whose low half is 0
    return _mm512_mask_mov_ps(v, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), as_f(set_i(0x7FC00000u)));
  }
  // 32-bit lanes whose low halves are those of low, and whose high halves are those of high.
  FK_HD I join_halves(I low, I high) { return _mm512_mask_blend_epi16(0xAAAAAAAAu, low, high); }
  FK_HD I load_int16(const int16_t *p) {
    return _mm512_cvtepi16_epi32(_mm256_loadu_si256((const __m256i *)p));
  }
  FK_HD void store_low_halves(void *p, I v) { _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi32_epi16(v)); }

  // For Philox: products of the low halves of 64-bit lanes. The high halves of a and b may hold anything.
  FK_HD I multiply(I a, I b) { return _mm512_mul_epu32(a, b); }
  FK_HD I high_half(I v) { return _mm512_srli_epi64(v, 32); }
  FK_HD I xor2(I a, I b) { return _mm512_xor_si512(a, b); }
  FK_HD I xor3(I a, I b, I c) { return _mm512_ternarylogic_epi32(a, b, c, 0x96); }
  FK_HD I join(I even, I odd) { return _mm512_mask_shuffle_epi32(even, 0xAAAA, odd, _MM_PERM_CDAB); }

  // In: rows[i] holds element i of each lane's octet. Out: rows[i] holds two octets, 16 elements beginning with
  // element kElementOfRow[i] of all 128. Two steps inside 128-bit lanes give rows of four elements. As groups are
  // dealt to lanes by kGroupOfLane, one two-source permutation then completes two whole neighbouring octets.
  static constexpr int kElementOfRow[8] = {0, 32, 64, 96, 16, 48, 80, 112};
  FK_HD void transpose_octets(F rows[8]) {
    F t[8], u[8];
    for (int i = 0; i < 4; ++i) {
      t[2 * i] = _mm512_unpacklo_ps(rows[2 * i], rows[2 * i + 1]);
      t[2 * i + 1] = _mm512_unpackhi_ps(rows[2 * i], rows[2 * i + 1]);
    }
    for (int half = 0; half < 2; ++half) {
      for (int i = 0; i < 2; ++i) {
        const __m512d lo = _mm512_castps_pd(t[4 * half + i]), hi = _mm512_castps_pd(t[4 * half + 2 + i]);
        u[4 * half + 2 * i] = _mm512_castpd_ps(_mm512_unpacklo_pd(lo, hi));
        u[4 * half + 2 * i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(lo, hi));
      }
    }
    // 128-bit lane q of u[i] holds elements 0..3 of octet 4 i + q, that of u[4 + i] its elements 4..7.
    const I front = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const I back = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
    for (int i = 0; i < 4; ++i) {
      rows[i] = _mm512_permutex2var_ps(u[i], front, u[4 + i]);
      rows[4 + i] = _mm512_permutex2var_ps(u[i], back, u[4 + i]);
    }
  }

  // Octets of 16-bit numbers: four vectors in memory order <-> vector j with the j-th pair of each lane's octet.
  // It transposes 4 x 4 words in every 128 bits and is its own inverse.
  FK_HD void transpose_pairs(I v[4]) {
    const I a = _mm512_unpacklo_epi32(v[0], v[1]), b = _mm512_unpacklo_epi32(v[2], v[3]);
    const I c = _mm512_unpackhi_epi32(v[0], v[1]), d = _mm512_unpackhi_epi32(v[2], v[3]);
    v[0] = _mm512_unpacklo_epi64(a, b);
    v[1] = _mm512_unpackhi_epi64(a, b);
    v[2] = _mm512_unpacklo_epi64(c, d);
    v[3] = _mm512_unpackhi_epi64(c, d);
  }

  static constexpr int kVectorsPerWord = 2; // vectors of the 32 elements of a Rademacher word
  // Lane l: -c if bit kLanes v + l of bits is set, else c.
  FK_HD F signed_by(uint32_t bits, int v, F c) {
    const I minus = xor2(as_i(c), set_i(0x80000000u));
    return _mm512_mask_blend_ps((__mmask16)(bits >> (16 * v)), c, as_f(minus));
  }

  // In: four Rademacher words in neighbouring lanes. Out: the four bits of each element e, that of the first word
  // lowest, from bit 4 (e / 4) of lane e mod 4 on. Two steps make pairs (bits e of two words: even e in the first lane,
  // odd e in the second), then pairs of pairs.
  static constexpr int kLookupTerms = 4;
  FK_HD I select(I mask, I set, I clear) { return _mm512_ternarylogic_epi32(mask, set, clear, 0xCA); }
  FK_HD I shuffle_bits(I v) {
    const I pairs = select(
        _mm512_set1_epi64((int64_t)0xAAAAAAAA55555555), v,
        select(_mm512_set1_epi64(0x5555555500000000), _mm512_slli_epi64(v, 31), _mm512_srli_epi64(v, 31)));
    const I other = _mm512_shuffle_epi32(pairs, _MM_PERM_BADC);
    const int64_t low = 0x3333333333333333, high = (int64_t)0xCCCCCCCCCCCCCCCC;
    const I stay = _mm512_setr_epi64(low, high, low, high, low, high, low, high);
    const I up = _mm512_setr_epi64(-1, 0, -1, 0, -1, 0, -1, 0);
    return select(stay, pairs, select(up, _mm512_slli_epi64(other, 2), _mm512_srli_epi64(other, 2)));
  }
  typedef __m512i Table; // sixteen sums
  FK_HD Table load_table(const uint32_t *p) { return load_i(p); }
  // From four shuffled lanes: the index of element l in the low bits of lane l, that of element 16 + l 16 bits higher.
  FK_HD I load_index(const uint32_t *p) {
    const I all = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)p));
    return _mm512_srlv_epi32(all, _mm512_setr_epi32(0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12));
  }
  FK_HD I lookup(Table table, I index) { return _mm512_permutexvar_epi32(index, table); }

  FK_HD F load_bf16(const uint16_t *p) {
    return as_f(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16));
  }
  // y as bf16, in the high half of each lane. A NaN needs no care: with finite coefficients and stored bf16 weights
  // it is the processor's own or that of a weight, made quiet. The low half of these is 0, so rounding carries nothing.
  FK_HD I bf16_in_high_half(F y) {
    const I bits = as_i(y);
    const I odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), set_i(1));
    return add_i(add_i(bits, set_i(0x7FFF)), odd);
  }
  FK_HD I bf16_pairs(F low, F high) {
    return join_halves(_mm512_srli_epi32(bf16_in_high_half(low), 16), bf16_in_high_half(high));
  }
  FK_HD void store_bf16(uint16_t *p, F y) {
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(bf16_in_high_half(y), 16)));
  }
  FK_HD F load_fp16(const uint16_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
  FK_HD void store_fp16(uint16_t *p, F y) {
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph(y, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
};

typedef Vec::F F;
typedef Vec::I I;

} // namespace
