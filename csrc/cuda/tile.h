// The beginning and end of the kernels for many terms, around their sums.
#pragma once

#include "flat.h"

struct TileShared {
  FlatTile tile;
  FoldedKeys rounding;
  uint32_t any_term;
};

// Called by all threads; the first one fills shared. A barrier must follow.
template <typename Storage>
FK_DEVICE void begin_tile(const FlatLaunch &launch, int64_t tile_elements, TileShared &shared) {
  if (threadIdx.x) return;
  const FlatTile tile = find_tile<Storage>(launch, tile_elements);
  shared.tile = tile;
  shared.any_term = 0;
  if (launch.terms.stochastic) {
    fold_keys(shared.rounding, term_rounding_seed(launch.terms), tile.stream,
              group_high(tile.first_element, FK_ROUNDING_GROUP_SHIFT), FK_TAG_ROUNDING);
  }
}

// Rounds and writes the octets of a thread: acc[p] are the sums of octet octet_of(p) of the tile.
template <typename Storage, typename Family, int kOctets, typename OctetOf>
FK_DEVICE void end_tile(const FlatLaunch &launch, const TileShared &shared,
                        const typename Storage::Arithmetic (&acc)[kOctets][kOctet], const OctetOf &octet_of) {
  using Arithmetic = typename Storage::Arithmetic;
  const FlatTile &tile = shared.tile;
  const Arithmetic alpha = tile.memory.in ? term_alpha<Arithmetic>(launch.terms) : (Arithmetic)1;
  const bool unchanged = tile.memory.in && !shared.any_term && alpha == (Arithmetic)1;
  const bool stochastic = Storage::kRounds && launch.terms.stochastic;
#pragma unroll
  for (int p = 0; p < kOctets; ++p) {
    const int32_t octet = octet_of(p);
    const OctetMemory memory = octet_memory<Storage>(tile, octet);
    if (memory.begin >= kOctet || memory.end <= 0) continue;
    const typename Storage::Octet weights = read_octet<Storage>(memory);
    if (unchanged) {
      copy_octet<Storage>(memory, weights);
      continue;
    }
    const uint64_t noise_octet = (tile.first_element >> kOctetShift) + (uint32_t)octet;
    RoundingBits bits;
    bits.stochastic = stochastic;
    if (stochastic)
      bits.words = folded_philox(low_product((uint32_t)noise_octet), load_keys(shared.rounding));
    write_sums<Storage, Family>(memory, weights, alpha, acc[p], bits, launch.terms, tile.stream, noise_octet);
  }
}
