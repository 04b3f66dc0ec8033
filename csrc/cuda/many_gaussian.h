// The kernel for any number of terms of Gaussian noise, whose speed arithmetic limits. Sums stay in registers. The
// terms come in chunks, which the whole block prepares in shared memory between two barriers.
#pragma once

#include "tile.h"

constexpr int kGaussianChunk = 64; // terms

template <typename Arithmetic> struct TermChunk {
  FoldedKeys keys[kGaussianChunk]; // word 19: the coefficient, if the arithmetic is fp32
  Arithmetic coeffs[kGaussianChunk];
};

// Prepares terms first .. first + kGaussianChunk - 1 in shared memory, one by each thread. Begins and ends with a
// barrier. Returns how many terms there are.
template <typename Arithmetic> FK_DEVICE int prepare_chunk(const TermArguments &terms, int64_t first,
                                                           const FlatTile &tile, TermChunk<Arithmetic> &chunk,
                                                           uint32_t &any_term) {
  const int num_terms = terms.count - first < kGaussianChunk ? (int)(terms.count - first) : kGaussianChunk;
  __syncthreads();
  if ((int)threadIdx.x < num_terms) {
    const int64_t k = first + threadIdx.x;
    const Arithmetic c = counted_coefficient<Gaussian, Arithmetic>(terms, k);
    FoldedKeys &keys = chunk.keys[threadIdx.x];
    fold_keys(keys, term_seed(terms, k), tile.stream, group_high(tile.first_element, FK_GAUSSIAN_GROUP_SHIFT),
              FK_TAG_GAUSSIAN);
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

template <typename Arithmetic, int kOctets> FK_DEVICE void clear_sums(Arithmetic (&acc)[kOctets][kOctet]) {
#pragma unroll
  for (int p = 0; p < kOctets; ++p) {
#pragma unroll
    for (int e = 0; e < kOctet; ++e) acc[p][e] = (Arithmetic)-0.0;
  }
}

// Blocks that a multiprocessor runs at once. On sm_100 three blocks would spill where weights may have residuals.
template <typename Storage> constexpr int gaussian_blocks() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
  if (Storage::kRounds) return 2;
#endif
  return ManyOctets<typename Storage::Arithmetic>::kBlocks;
}

template <typename Storage> __global__ void __launch_bounds__(kThreads, gaussian_blocks<Storage>())
    many_gaussian(const __grid_constant__ FlatLaunch launch) {
  using Arithmetic = typename Storage::Arithmetic;
  constexpr int kOctets = ManyOctets<Arithmetic>::kCount;
  __shared__ TileShared shared;
  __shared__ TermChunk<Arithmetic> chunk;
  begin_tile<Storage>(launch, ManyOctets<Arithmetic>::kTile, shared);
  __syncthreads();
  const FlatTile &tile = shared.tile;
  const uint32_t group = group_low(tile.first_element, FK_GAUSSIAN_GROUP_SHIFT) + threadIdx.x;
  Arithmetic acc[kOctets][kOctet];
  clear_sums(acc);
  for (int64_t first = 0; first < launch.terms.count; first += kGaussianChunk) {
    const int num_terms = prepare_chunk(launch.terms, first, tile, chunk, shared.any_term);
#pragma unroll 1
    for (int k = 0; k < num_terms; ++k) {
      const FoldedKeys keys = load_keys(chunk.keys[k]);
      const Arithmetic c = chunk_coefficient(keys, &chunk.coeffs[k]);
      if (c == (Arithmetic)0) continue;
#pragma unroll
      for (int p = 0; p < kOctets; ++p) {
        add_gaussian(acc[p], folded_philox(low_product(group + p * kThreads), keys), c);
      }
    }
  }
  end_tile<Storage, Gaussian>(launch, shared, acc, [](int p) { return p * kThreads + (int32_t)threadIdx.x; });
}
