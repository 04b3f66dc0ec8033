// The kernel for any number of terms of Rademacher noise. Its sums (contract section 6.3) are products of a matrix of
// bits, elements by terms, with the scaled coefficients q; the tensor cores multiply them as matrices of bytes. A q is
// written in digits of 8 bits, -128 to 127, each in a column of its own. Bits are masked, not shifted: bit i of a byte
// stays in its place, so its row of the product is 2^i times too large, and is shifted at the end.
//
// With S the sum of the q whose bits are set (z = -1), and Q the sum of all q, the sum is A = Q - 2 S.
#pragma once

#include "matrix.h"
#include "tile.h"

constexpr int kTermBlock = kThreads; // terms whose keys and digits are prepared at once, one by each thread
constexpr int kWordChunk = 64;       // terms whose words are made between two barriers
constexpr int kRademacherTile = kOctet * kThreads;
constexpr int kTileGroups = kRademacherTile >> FK_RADEMACHER_GROUP_SHIFT;
constexpr int kThreadsOfTerm = kThreads / kWordChunk;
constexpr int kProductsOfThread = 16; // matrix products of a warp for its 256 elements

template <typename Arithmetic> struct RademacherShared {
  TermSurvey<Arithmetic> survey;
  typename Integers<Arithmetic>::Unsigned total; // Q
  FoldedKeys keys[kTermBlock];
  uint32_t digits[kTermBlock / kMatrixTerms][2][32]; // as the threads of a warp hold them
  uint4 words[kWordChunk][kTileGroups + 2];          // two more than groups: the next term is in other banks
};

// 0x80 in every byte. The bytes of a number plus this are its digits, each plus 128.
template <typename Unsigned> constexpr Unsigned kCarries = ~(Unsigned)0 / 0xFF * 0x80;

// Prepares the keys and digits of a block of terms. Beyond the last term digits are zeros, so that words do not matter.
// own_total: Q of the calling thread's terms.
template <typename Arithmetic>
FK_DEVICE void prepare_terms(const TermArguments &terms, int64_t first, const FlatTile &tile,
                             const TermScale<Arithmetic> &scale, RademacherShared<Arithmetic> &shared,
                             typename Integers<Arithmetic>::Unsigned &own_total) {
  using Unsigned = typename Integers<Arithmetic>::Unsigned;
  const unsigned k = threadIdx.x;
  Unsigned q = 0;
  if (first + k < terms.count) {
    bool skipped;
    q = (Unsigned)scaled_coefficient(term_coefficient<Rademacher, Arithmetic>(terms, first + k, skipped),
                                     scale);
    fold_keys(shared.keys[k], term_seed(terms, first + k), tile.stream,
              group_high(tile.first_element, FK_RADEMACHER_GROUP_SHIFT), FK_TAG_RADEMACHER);
  }
  own_total += q;
  // Term t + 4 i of a half (16 terms) is byte i of the words that threads 4 g + t hold.
  uint8_t *bytes = (uint8_t *)shared.digits[k / kMatrixTerms][k % kMatrixTerms / 16] + k % 4 * 4 + k % 16 / 4;
#pragma unroll
  for (unsigned column = 0; column < kMatrixColumns; ++column) {
    const unsigned digit = column % sizeof(Arithmetic); // columns beyond the last digit repeat the digits
    bytes[column * 16] = (uint8_t)((q + kCarries<Unsigned>) >> 8 * digit) ^ 0x80u;
  }
}

// Makes the words of the chunk that begins with term `first` of the block. The kThreadsOfTerm threads of a term take
// its groups in turn.
template <typename Arithmetic>
FK_DEVICE void make_words(uint32_t group, int first, int num_terms, RademacherShared<Arithmetic> &shared) {
  const int k = (int)threadIdx.x / kThreadsOfTerm;
  if (k >= num_terms) return;
  const FoldedKeys keys = load_keys(shared.keys[first + k]);
#pragma unroll
  for (int i = 0; i < kTileGroups / kThreadsOfTerm; ++i) {
    const unsigned g = threadIdx.x % kThreadsOfTerm + i * kThreadsOfTerm;
    const fk_words made = folded_philox(low_product(group + g), keys);
    shared.words[k][g] = make_uint4(made.w[0], made.w[1], made.w[2], made.w[3]);
  }
}

// Adds 32 terms to the products of a warp, beginning with term `first` of the chunk. digits: those of the terms.
template <typename Arithmetic> FK_DEVICE void add_products(MatrixSums (&sums)[kProductsOfThread], int first,
                                                           const uint32_t (&digits)[2][32],
                                                           const RademacherShared<Arithmetic> &shared) {
  const unsigned lane = threadIdx.x % 32;
  // A warp has eight words of each term, four threads share one, and each of these takes eight of the terms.
  const unsigned own_word = threadIdx.x / 4, place = lane % 4;
  ByteMatrix bits[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      words[i] = ((const uint32_t *)shared.words[first + half * 16 + place + 4 * i])[own_word];
    }
    bits[half] = transposed(words);
  }
  const uint32_t columns[2] = {digits[0][lane], digits[1][lane]};
#pragma unroll
  for (int p = 0; p < kProductsOfThread; ++p) {
    const uint32_t even = 0x01010101u << (2 * (p % 4)), odd = even << 1;
    const uint32_t rows[4] = {bits[0].row[p / 4] & even, bits[0].row[p / 4] & odd, bits[1].row[p / 4] & even,
                              bits[1].row[p / 4] & odd};
    multiply_accumulate(sums[p], rows, columns);
  }
}

// S of the eight elements of the calling thread's octet, summed over the digits. Four threads share a word: each holds
// two digits of all its 32 elements, and ends with all digits of a quarter of them.
template <typename Unsigned>
FK_DEVICE void join_digits(Unsigned (&joined)[kOctet], const MatrixSums (&sums)[kProductsOfThread]) {
  constexpr bool kAllColumns = sizeof(Unsigned) == 8; // else columns 4 to 7 repeat 0 to 3
  const bool upper = threadIdx.x & 2, odd = threadIdx.x & 1;
  const unsigned shift = 16 * (threadIdx.x & (kAllColumns ? 3u : 1u));
  // Two digits of one element, from the products of `byte`; if later, from those of byte + 2.
  const auto value = [&](int byte, int bit, bool later) {
    const int32_t (&w)[4] = sums[byte * 4 + bit / 2].w, (&later_w)[4] = sums[byte * 4 + 8 + bit / 2].w;
    const int32_t low = later ? later_w[bit % 2 * 2] : w[bit % 2 * 2];
    const int32_t high = later ? later_w[bit % 2 * 2 + 1] : w[bit % 2 * 2 + 1];
    return ((Unsigned)(int64_t)(low >> bit) + ((Unsigned)(int64_t)(high >> bit) << 8)) << shift;
  };
#pragma unroll
  for (int bit = 0; bit < kOctet; ++bit) {
    Unsigned quarter[2];
#pragma unroll
    for (int byte = 0; byte < 2; ++byte) {
      quarter[byte] = value(byte, bit, upper);
      if (kAllColumns) quarter[byte] += exchange(value(byte, bit, !upper), 2);
    }
    joined[bit] = (odd ? quarter[1] : quarter[0]) + exchange(odd ? quarter[0] : quarter[1], 1);
  }
}

template <typename Storage> __global__ void __launch_bounds__(kThreads, 2)
    many_rademacher(const __grid_constant__ FlatLaunch launch) {
  using Arithmetic = typename Storage::Arithmetic;
  using Integer = typename Integers<Arithmetic>::Type;
  using Unsigned = typename Integers<Arithmetic>::Unsigned;
  __shared__ TileShared tile;
  __shared__ RademacherShared<Arithmetic> shared;
  begin_tile<Storage>(launch, kRademacherTile, tile);
  if (threadIdx.x == 0) {
    shared.survey = {};
    shared.total = 0;
  }
  __syncthreads();
  survey_terms<kThreads>(launch.terms, shared.survey);
  __syncthreads();
  const TermScale<Arithmetic> scale = scale_of(shared.survey);
  if (threadIdx.x == 0) tile.any_term = shared.survey.num_terms;
  MatrixSums sums[kProductsOfThread] = {};
  Unsigned own_total = 0;
  const uint32_t group = group_low(tile.tile.first_element, FK_RADEMACHER_GROUP_SHIFT);
  for (int64_t block = 0; block < launch.terms.count; block += kTermBlock) {
    const int64_t remaining = launch.terms.count - block;
    const int in_block = remaining < kTermBlock ? (int)remaining : kTermBlock;
    prepare_terms(launch.terms, block, tile.tile, scale, shared, own_total);
    __syncthreads();
#pragma unroll 1
    for (int chunk = 0; chunk < in_block; chunk += kWordChunk) {
      const int num_terms = in_block - chunk < kWordChunk ? in_block - chunk : kWordChunk;
      make_words(group, chunk, num_terms, shared);
      __syncthreads();
#pragma unroll 1
      for (int k = 0; k < num_terms; k += kMatrixTerms) {
        add_products(sums, k, shared.digits[(chunk + k) / kMatrixTerms], shared);
      }
      __syncthreads();
    }
  }
  if (own_total) add_total(shared.total, own_total);
  Unsigned joined[kOctet];
  join_digits(joined, sums);
  __syncthreads();
  Arithmetic acc[1][kOctet];
#pragma unroll
  for (int i = 0; i < kOctet; ++i) {
    acc[0][i] =
        tile.any_term ? unscaled_sum((Integer)(shared.total - 2 * joined[i]), scale) : (Arithmetic)-0.0;
  }
  end_tile<Storage, Rademacher>(launch, tile, acc, [](int) { return (int32_t)threadIdx.x; });
}
