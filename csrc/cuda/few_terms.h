// One or two terms: bound by memory, or nearly. Round keys stay in registers; weights are read before the
// noise is made, so that the one hides the other.
#pragma once

#include "flat.h"

template <int kTerms> struct FewShared {
  FlatTile tile;
  FoldedKeys keys[kTerms];
  FoldedKeys rounding;
};

// By the first thread of each warp: warp 0 finds the tile, warps 1.. prepare one term each, the next the
// rounding.
template <typename Storage, typename Family, int kTerms>
FK_DEVICE void prepare_few(const FlatLaunch &launch, FewShared<kTerms> &shared) {
  constexpr unsigned kWarp = 32;
  const unsigned role = threadIdx.x / kWarp;
  if (threadIdx.x % kWarp || role > kTerms + 1) return;
  const FlatTile tile = find_tile<Storage>(launch, kFewTile);
  if (role == 0) {
    shared.tile = tile;
  } else if (role <= kTerms) {
    FoldedKeys &keys = shared.keys[role - 1];
    const uint64_t seed = term_seed(launch.terms, role - 1);
    fold_keys(keys, seed, tile.stream, group_high(tile.first_element, Family::kGroupShift), Family::kTag);
    keys.w[19] = fk_bits_from_float(counted_coefficient<float>(launch.terms, role - 1));
  } else if (launch.terms.stochastic) {
    fold_keys(shared.rounding, term_rounding_seed(launch.terms), tile.stream,
              group_high(tile.first_element, FK_ROUNDING_GROUP_SHIFT), FK_TAG_ROUNDING);
  }
}

// The keys of all terms, in registers.
template <int kTerms> struct FewTerms {
  FoldedKeys keys[kTerms];
  FK_DEVICE float coefficient(int k) const { return fk_float_from_bits(keys[k].w[19]); }
};

// Sums of one piece. kAllTerms: none is to be skipped.
template <typename Family, bool kAllTerms, int kTerms> FK_DEVICE void
sum_terms(float (&acc)[kPiece], uint32_t first_group, uint32_t piece, const FewTerms<kTerms> &terms) {
  const uint64_t product = low_product(first_group + (piece >> (Family::kGroupShift - kPieceShift)));
#pragma unroll
  for (int e = 0; e < kPiece; ++e) acc[e] = -0.0f;
#pragma unroll
  for (int k = 0; k < kTerms; ++k) {
    if (kAllTerms || terms.coefficient(k) != 0.0f) {
      add_term<Family>(acc, folded_philox(product, terms.keys[k]), piece, terms.coefficient(k));
    }
  }
}

template <typename Storage, typename Family, int kTerms> __global__ void __launch_bounds__(kThreads)
    few_terms(const __grid_constant__ FlatLaunch launch) {
  __shared__ FewShared<kTerms> shared;
  prepare_few<Storage, Family, kTerms>(launch, shared);
  __syncthreads();
  const FlatTile &tile = shared.tile;
  FewTerms<kTerms> terms;
  bool any_term = false, all_terms = true;
#pragma unroll
  for (int k = 0; k < kTerms; ++k) {
    terms.keys[k] = load_keys(shared.keys[k]);
    any_term |= terms.coefficient(k) != 0.0f;
    all_terms &= terms.coefficient(k) != 0.0f;
  }
  const float alpha = tile.memory.in ? term_alpha<float>(launch.terms) : 1.0f;
  const bool stochastic = Storage::kRounds && launch.terms.stochastic;
  const uint32_t first_group = group_low(tile.first_element, Family::kGroupShift);

  // The short way: steps of kFewPieces whole pieces a thread, when nothing is asked for that it leaves out.
  constexpr int32_t kStep = kPiece * kThreads * kFewPieces; // elements
  const bool plain =
      tile.memory.whole && tile.memory.in && !tile.memory.out_minus && all_terms && !stochastic;
  const int32_t whole_first = plain ? (tile.memory.begin + kStep - 1) / kStep : 0;
  const int32_t whole_last = plain ? tile.memory.end / kStep : 0;
  constexpr int32_t kStepBytes = kStep * (int32_t)sizeof(typename Storage::Element);
  const int64_t thread_bytes = (int64_t)(threadIdx.x * kPiece * sizeof(typename Storage::Element));
  const char *in = tile.memory.in + whole_first * (int64_t)kStepBytes + thread_bytes;
  char *out = tile.memory.out + whole_first * (int64_t)kStepBytes + thread_bytes;
#pragma unroll 1
  for (int32_t step = whole_first; step < whole_last; ++step, in += kStepBytes, out += kStepBytes) {
    typename Storage::Piece weights[kFewPieces];
#pragma unroll
    for (int p = 0; p < kFewPieces; ++p) weights[p] = read_whole<Storage>(in + p * (kStepBytes / kFewPieces));
#pragma unroll
    for (int p = 0; p < kFewPieces; ++p) {
      const uint32_t piece = (uint32_t)(step * kFewPieces + p) * kThreads + threadIdx.x;
      float acc[kPiece];
      sum_terms<Family, true>(acc, first_group, piece, terms);
      add_weights<Storage>(acc, alpha, weights[p]);
      Storage::round_nearest(acc, weights[p]);
      write_whole<Storage>(out + p * (kStepBytes / kFewPieces), weights[p]);
    }
  }

  // The long way, a piece a thread at a time: what those steps leave of the tile.
  constexpr int32_t kRow = kPiece * kThreads; // elements
  const bool unchanged = tile.memory.in && !any_term && alpha == 1.0f;
  const int32_t last_row = (tile.memory.end + kRow - 1) / kRow;
#pragma unroll 1
  for (int32_t row = tile.memory.begin / kRow; row < last_row; ++row) {
    if (row >= whole_first * kFewPieces && row < whole_last * kFewPieces) continue;
    const uint32_t piece = (uint32_t)row * kThreads + threadIdx.x;
    const PieceMemory memory = piece_memory<Storage>(tile, (int32_t)piece);
    const typename Storage::Piece weights = read_piece<Storage>(memory);
    if (unchanged) {
      copy_piece<Storage>(memory, weights);
      continue;
    }
    float acc[kPiece];
    sum_terms<Family, false>(acc, first_group, piece, terms);
    const uint64_t noise_piece = (tile.first_element >> kPieceShift) + piece;
    RoundingNoise noise;
    noise.stochastic = stochastic;
    if (stochastic)
      noise.words = folded_philox(low_product((uint32_t)noise_piece), load_keys(shared.rounding));
    write_sums<Storage, Family>(memory, weights, alpha, acc, noise, launch.terms, tile.stream, noise_piece);
  }
}
