// Any number of terms: bound by arithmetic. Sums stay in registers while the terms pass by in chunks,
// prepared in shared memory by the whole block between two barriers.
#pragma once

#include "flat.h"

constexpr int kGaussianChunk = 64;
constexpr int kRademacherChunk = 32;

template <typename Arithmetic, int kChunk> struct TermChunk {
  FoldedKeys keys[kChunk]; // word 19: the coefficient, when the arithmetic is fp32
  Arithmetic coeffs[kChunk];
};

struct ManyShared {
  FlatTile tile;
  FoldedKeys rounding;
  uint32_t any_term;
};

// The first thread finds the tile; ends with a barrier.
template <typename Storage> FK_DEVICE void begin_tile(const FlatLaunch &launch, ManyShared &shared) {
  if (threadIdx.x == 0) {
    const FlatTile tile = find_tile<Storage>(launch, ManyPieces<typename Storage::Arithmetic>::kTile);
    shared.tile = tile;
    shared.any_term = 0;
    if (launch.terms.stochastic) {
      fold_keys(shared.rounding, term_rounding_seed(launch.terms), tile.stream,
                group_high(tile.first_element, FK_ROUNDING_GROUP_SHIFT), FK_TAG_ROUNDING);
    }
  }
  __syncthreads();
}

// Terms first .. first + kChunk - 1 into shared memory, by one thread each; begins and ends with a barrier.
// Returns how many there are.
template <typename Family, typename Arithmetic, int kChunk>
FK_DEVICE int prepare_chunk(const TermArguments &terms, int64_t first, const FlatTile &tile,
                            TermChunk<Arithmetic, kChunk> &chunk, uint32_t &any_term) {
  const int num_terms = terms.count - first < kChunk ? (int)(terms.count - first) : kChunk;
  __syncthreads();
  if ((int)threadIdx.x < num_terms) {
    const int64_t k = first + threadIdx.x;
    const Arithmetic c = counted_coefficient<Arithmetic>(terms, k);
    FoldedKeys &keys = chunk.keys[threadIdx.x];
    fold_keys(keys, term_seed(terms, k), tile.stream, group_high(tile.first_element, Family::kGroupShift),
              Family::kTag);
    keys.w[19] = fk_bits_from_float((float)c);
    chunk.coeffs[threadIdx.x] = c;
    if (c != (Arithmetic)0) atomicOr(&any_term, 1u);
  }
  __syncthreads();
  return num_terms;
}

FK_DEVICE float chunk_coefficient(const FoldedKeys &keys, const float *) {
  return fk_float_from_bits(keys.w[19]);
}
FK_DEVICE double chunk_coefficient(const FoldedKeys &, const double *coefficient) { return *coefficient; }

// Rounds and writes the pieces of a thread; pieces[p] is piece_of(p) of the tile.
template <typename Storage, typename Family, int kPieces, typename PieceOf>
FK_DEVICE void end_tile(const FlatLaunch &launch, const ManyShared &shared,
                        const typename Storage::Arithmetic (&acc)[kPieces][kPiece], const PieceOf &piece_of) {
  using Arithmetic = typename Storage::Arithmetic;
  const FlatTile &tile = shared.tile;
  const Arithmetic alpha = tile.memory.in ? term_alpha<Arithmetic>(launch.terms) : (Arithmetic)1;
  const bool unchanged = tile.memory.in && !shared.any_term && alpha == (Arithmetic)1;
  const bool stochastic = Storage::kRounds && launch.terms.stochastic;
#pragma unroll
  for (int p = 0; p < kPieces; ++p) {
    const int32_t piece = piece_of(p);
    const PieceMemory memory = piece_memory<Storage>(tile, piece);
    if (memory.begin >= kPiece || memory.end <= 0) continue;
    const typename Storage::Piece weights = read_piece<Storage>(memory);
    if (unchanged) {
      copy_piece<Storage>(memory, weights);
      continue;
    }
    const uint64_t noise_piece = (tile.first_element >> kPieceShift) + (uint32_t)piece;
    RoundingNoise noise;
    noise.stochastic = stochastic;
    if (stochastic)
      noise.words = folded_philox(low_product((uint32_t)noise_piece), load_keys(shared.rounding));
    write_sums<Storage, Family>(memory, weights, alpha, acc[p], noise, launch.terms, tile.stream,
                                noise_piece);
  }
}

template <typename Arithmetic, int kPieces> FK_DEVICE void clear_sums(Arithmetic (&acc)[kPieces][kPiece]) {
#pragma unroll
  for (int p = 0; p < kPieces; ++p) {
#pragma unroll
    for (int e = 0; e < kPiece; ++e) acc[p][e] = (Arithmetic)-0.0;
  }
}

template <typename Storage>
__global__ void __launch_bounds__(kThreads, ManyPieces<typename Storage::Arithmetic>::kBlocks)
    many_gaussian(const __grid_constant__ FlatLaunch launch) {
  using Arithmetic = typename Storage::Arithmetic;
  constexpr int kPieces = ManyPieces<Arithmetic>::kCount;
  __shared__ ManyShared shared;
  __shared__ TermChunk<Arithmetic, kGaussianChunk> chunk;
  begin_tile<Storage>(launch, shared);
  const FlatTile &tile = shared.tile;
  const uint32_t group = group_low(tile.first_element, FK_GAUSSIAN_GROUP_SHIFT) + threadIdx.x;
  Arithmetic acc[kPieces][kPiece];
  clear_sums(acc);
  for (int64_t first = 0; first < launch.terms.count; first += kGaussianChunk) {
    const int num_terms = prepare_chunk<Gaussian>(launch.terms, first, tile, chunk, shared.any_term);
#pragma unroll 1
    for (int k = 0; k < num_terms; ++k) {
      const FoldedKeys keys = load_keys(chunk.keys[k]);
      const Arithmetic c = chunk_coefficient(keys, &chunk.coeffs[k]);
      if (c == (Arithmetic)0) continue;
#pragma unroll
      for (int p = 0; p < kPieces; ++p) {
        add_gaussian(acc[p], folded_philox(low_product(group + p * kThreads), keys), c);
      }
    }
  }
  end_tile<Storage, Gaussian>(launch, shared, acc, [](int p) { return p * kThreads + (int32_t)threadIdx.x; });
}

// A thread sums the elements of one word (of half a word in fp64): a quarter of what one call of Philox
// yields. So the block first makes all words of a chunk, each once, and then every thread reads its own.
template <typename Storage>
__global__ void __launch_bounds__(kThreads, ManyPieces<typename Storage::Arithmetic>::kBlocks)
    many_rademacher(const __grid_constant__ FlatLaunch launch) {
  using Arithmetic = typename Storage::Arithmetic;
  constexpr int kPieces = ManyPieces<Arithmetic>::kCount;
  constexpr int kGroups = ManyPieces<Arithmetic>::kTile >> FK_RADEMACHER_GROUP_SHIFT;
  constexpr int kElements = kPieces * kPiece; // of a thread
  __shared__ ManyShared shared;
  __shared__ TermChunk<Arithmetic, kRademacherChunk> chunk;
  __shared__ uint4 words[kRademacherChunk][kGroups];
  begin_tile<Storage>(launch, shared);
  const FlatTile &tile = shared.tile;
  const unsigned own_group = threadIdx.x % kGroups;
  const uint64_t product = low_product(group_low(tile.first_element, FK_RADEMACHER_GROUP_SHIFT) + own_group);
  const unsigned own_word = threadIdx.x * kElements / 32;
  const unsigned own_bit = threadIdx.x * kElements % 32;
  Arithmetic acc[kPieces][kPiece];
  clear_sums(acc);
  for (int64_t first = 0; first < launch.terms.count; first += kRademacherChunk) {
    const int num_terms = prepare_chunk<Rademacher>(launch.terms, first, tile, chunk, shared.any_term);
#pragma unroll 1
    for (int k = threadIdx.x / kGroups; k < num_terms; k += kThreads / kGroups) {
      const fk_words made = folded_philox(product, load_keys(chunk.keys[k]));
      words[k][own_group] = make_uint4(made.w[0], made.w[1], made.w[2], made.w[3]);
    }
    __syncthreads();
#pragma unroll 2
    for (int k = 0; k < num_terms; ++k) {
      const Arithmetic c = chunk.coeffs[k];
      if (c == (Arithmetic)0) continue;
      const uint32_t bits = ((const uint32_t *)words[k])[own_word] >> own_bit;
#pragma unroll
      for (int e = 0; e < kElements; ++e) {
        add_signed(acc[e / kPiece][e % kPiece], c, bits & 1u << e);
      }
    }
  }
  end_tile<Storage, Rademacher>(launch, shared, acc,
                                [](int p) { return (int32_t)threadIdx.x * kPieces + p; });
}
