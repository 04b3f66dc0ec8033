// Eight 32-bit lanes for kernels.inc. Compiled with -march=x86-64-v3 (AVX2, FMA, F16C).
#pragma once

#include <immintrin.h>

#include "kernels.h"

namespace { // internal linkage: Vec is another type for each instruction set

struct Vec {
  static constexpr int kLanes = 8;
  typedef __m256 F;
  typedef __m256i I;

  FK_HD F set_f(float x) { return _mm256_set1_ps(x); }
  FK_HD I set_i(uint32_t x) { return _mm256_set1_epi32((int)x); }
  // Which of 8 consecutive groups a lane works on (lane 4 q + i: group 2 i + q); the transpositions rely on it.
  static constexpr uint32_t kGroupOfLane[kLanes] = {0, 2, 4, 6, 1, 3, 5, 7};
  FK_HD F load_f(const float *p) { return _mm256_loadu_ps(p); }
  FK_HD I load_i(const uint32_t *p) { return _mm256_loadu_si256((const __m256i *)p); }
  FK_HD void store_f(float *p, F v) { _mm256_storeu_ps(p, v); }
  FK_HD void store_i(uint32_t *p, I v) { _mm256_storeu_si256((__m256i *)p, v); }
  FK_HD F as_f(I v) { return _mm256_castsi256_ps(v); }
  FK_HD I as_i(F v) { return _mm256_castps_si256(v); }

  FK_HD F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  FK_HD F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  FK_HD F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  FK_HD F fms(F a, F b, F c) { return _mm256_fmsub_ps(a, b, c); }
  FK_HD F fnma(F a, F b, F c) { return _mm256_fnmadd_ps(a, b, c); } // c - a b, one rounding
  FK_HD F from_int(I v) { return _mm256_cvtepi32_ps(v); }
  FK_HD I add_i(I a, I b) { return _mm256_add_epi32(a, b); }
  FK_HD I sub_i(I a, I b) { return _mm256_sub_epi32(a, b); }
  FK_HD I max_i(I a, I b) { return _mm256_max_epi32(a, b); } // signed
  FK_HD I and_or(I v, I mask, I base) { return _mm256_or_si256(_mm256_and_si256(v, mask), base); }
  FK_HD I and2(I a, I b) { return _mm256_and_si256(a, b); }
  template <int n> FK_HD I shift_right(I v) { return _mm256_srli_epi32(v, n); }
  template <int n> FK_HD I shift_left(I v) { return _mm256_slli_epi32(v, n); }
  template <int n> FK_HD I shift_right_signed(I v) { return _mm256_srai_epi32(v, n); }
  FK_HD I nearest_int(F v) { return _mm256_cvtps_epi32(v); } // 2^31 for NaN and out of range
  FK_HD F quiet(F v) { // v, with every NaN made one pattern whose low half is 0
    return _mm256_blendv_ps(v, as_f(set_i(0x7FC00000u)), _mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  }
  // 32-bit lanes whose low halves are those of low, and whose high halves are those of high.
  FK_HD I join_halves(I low, I high) { return _mm256_blend_epi16(low, high, 0xAA); }
  FK_HD I load_int16(const int16_t *p) { return _mm256_cvtepi16_epi32(_mm_loadu_si128((const __m128i *)p)); }
  FK_HD void store_low_halves(void *p, I v) {
    const I low = _mm256_and_si256(v, set_i(0xFFFF));
    const I packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(low, low), 0x08);
    _mm_storeu_si128((__m128i *)p, _mm256_castsi256_si128(packed));
  }

  // For Philox: products of the low halves of 64-bit lanes. The high halves of a and b may hold anything.
  FK_HD I multiply(I a, I b) { return _mm256_mul_epu32(a, b); }
  FK_HD I high_half(I v) { return _mm256_srli_epi64(v, 32); }
  FK_HD I xor2(I a, I b) { return _mm256_xor_si256(a, b); }
  FK_HD I xor3(I a, I b, I c) { return _mm256_xor_si256(a, _mm256_xor_si256(b, c)); }
  FK_HD I join(I even, I odd) { return _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA); }

  // In: rows[i] holds element i of each lane's octet. Out: rows[i] holds the 8 elements of one octet, beginning
  // with element kElementOfRow[i] of all 64.
  static constexpr int kElementOfRow[8] = {0, 16, 32, 48, 8, 24, 40, 56};
  FK_HD void transpose_octets(F rows[8]) {
    F t[8], u[8];
    for (int i = 0; i < 4; ++i) {
      t[2 * i] = _mm256_unpacklo_ps(rows[2 * i], rows[2 * i + 1]);
      t[2 * i + 1] = _mm256_unpackhi_ps(rows[2 * i], rows[2 * i + 1]);
    }
    for (int half = 0; half < 2; ++half) {
      for (int i = 0; i < 2; ++i) {
        const __m256d lo = _mm256_castps_pd(t[4 * half + i]), hi = _mm256_castps_pd(t[4 * half + 2 + i]);
        u[4 * half + 2 * i] = _mm256_castpd_ps(_mm256_unpacklo_pd(lo, hi));
        u[4 * half + 2 * i + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(lo, hi));
      }
    }
    for (int i = 0; i < 4; ++i) {
      rows[i] = _mm256_permute2f128_ps(u[i], u[4 + i], 0x20);
      rows[4 + i] = _mm256_permute2f128_ps(u[i], u[4 + i], 0x31);
    }
  }

  // Octets of 16-bit numbers: four vectors in memory order <-> vector j with the j-th pair of each lane's octet.
  // It transposes 4 x 4 words in every 128 bits and is its own inverse.
  FK_HD void transpose_pairs(I v[4]) {
    const I a = _mm256_unpacklo_epi32(v[0], v[1]), b = _mm256_unpacklo_epi32(v[2], v[3]);
    const I c = _mm256_unpackhi_epi32(v[0], v[1]), d = _mm256_unpackhi_epi32(v[2], v[3]);
    v[0] = _mm256_unpacklo_epi64(a, b);
    v[1] = _mm256_unpackhi_epi64(a, b);
    v[2] = _mm256_unpacklo_epi64(c, d);
    v[3] = _mm256_unpackhi_epi64(c, d);
  }

  static constexpr int kVectorsPerWord = 4; // vectors of the 32 elements of a Rademacher word
  // Lane l: -c if bit kLanes v + l of bits is set, else c.
  FK_HD F signed_by(uint32_t bits, int v, F c) {
    const I shift = _mm256_setr_epi32(31 - 8 * v, 30 - 8 * v, 29 - 8 * v, 28 - 8 * v, 27 - 8 * v, 26 - 8 * v,
                                      25 - 8 * v, 24 - 8 * v);
    return _mm256_xor_ps(c, as_f(and2(_mm256_sllv_epi32(set_i(bits), shift), set_i(0x80000000u))));
  }

  // In: two Rademacher words a and b in neighbouring lanes. Out: the pairs (bit e of a, bit e of b); those of even e
  // are bits e and e + 1 of the first lane, those of odd e are bits e - 1 and e of the second.
  static constexpr int kLookupTerms = 2;
  FK_HD I shuffle_bits(I v) {
    const I stay = _mm256_set1_epi64x((int64_t)0xAAAAAAAA55555555), down = _mm256_set1_epi64x(0xAAAAAAAA),
            up = _mm256_set1_epi64x(0x5555555500000000);
    const I moved = _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi64(v, 31), down),
                                    _mm256_and_si256(_mm256_slli_epi64(v, 31), up));
    return _mm256_or_si256(_mm256_and_si256(v, stay), moved);
  }
  typedef __m256 Table; // four sums, twice
  FK_HD Table load_table(const uint32_t *p) { return _mm256_broadcast_ps((const __m128 *)(const void *)p); }
  // From two shuffled lanes: the index of element l in the low bits of lane l, that of element 8 + l 8 bits higher, ...
  FK_HD I load_index(const uint32_t *p) {
    long long both;
    __builtin_memcpy(&both, p, sizeof both);
    return _mm256_srlv_epi32(_mm256_set1_epi64x(both), _mm256_setr_epi32(0, 0, 2, 2, 4, 4, 6, 6));
  }
  FK_HD I lookup(Table table, I index) { return as_i(_mm256_permutevar_ps(table, index)); }

  FK_HD F load_bf16(const uint16_t *p) {
    return as_f(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16));
  }
  // y as bf16, in the high half of each lane. A NaN needs no care: with finite coefficients and stored bf16 weights
  // it is the processor's own or that of a weight, made quiet. The low half of these is 0, so rounding carries nothing.
  FK_HD I bf16_in_high_half(F y) {
    const I bits = as_i(y);
    const I odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), set_i(1));
    return add_i(add_i(bits, set_i(0x7FFF)), odd);
  }
  FK_HD I bf16_pairs(F low, F high) {
    return join_halves(_mm256_srli_epi32(bf16_in_high_half(low), 16), bf16_in_high_half(high));
  }
  FK_HD void store_bf16(uint16_t *p, F y) {
    const I high = _mm256_srli_epi32(bf16_in_high_half(y), 16);
    const I packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0x08);
    _mm_storeu_si128((__m128i *)p, _mm256_castsi256_si128(packed));
  }
  FK_HD F load_fp16(const uint16_t *p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)); }
  FK_HD void store_fp16(uint16_t *p, F y) {
    _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph(y, _MM_FROUND_TO_NEAREST_INT));
  }
};

typedef Vec::F F;
typedef Vec::I I;

} // namespace
