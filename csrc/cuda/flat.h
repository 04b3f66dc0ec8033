// Kernels over flat tensors, which are contiguous in the order of their elements. A block computes one tile: the
// elements [n T, (n + 1) T) of a tensor's noise, for one n, so that all its groups have the same high half.
// Tiles are aligned to the noise, not to memory: a tile may begin before its tensor or end after it.
#pragma once

#include "octet.h"

constexpr int kThreads = 256;
// Few terms: a loop over octets, with the keys in registers. A thread computes kFewOctets at once.
constexpr int kFewOctets = 2;
constexpr int kFewIterations = 4;
constexpr int kFewTile = kOctet * kThreads * kFewOctets * kFewIterations;
// Many terms: a loop over terms, with the sums in registers.
template <typename Arithmetic> struct ManyOctets {
  static constexpr int kCount = sizeof(Arithmetic) == 8 ? 2 : 4;
  static constexpr int kTile = kOctet * kThreads * kCount;
  static constexpr int kBlocks =
      sizeof(Arithmetic) == 8 ? 2 : 3; // on a multiprocessor at once, without spills
};

struct FlatTile {
  OctetMemory memory; // of the tile's first octet; begin, end: elements of the tile that belong to the tensor
  uint64_t first_element;
  uint32_t stream;
};

template <typename Storage> FK_DEVICE FlatTile find_tile(const FlatLaunch &launch, int64_t tile_elements) {
  const FlatTensor &tensor = tensor_of_tile(launch.tensors, launch.num_tensors, blockIdx.x);
  FlatTile tile;
  tile.first_element = (tensor.first_element & ~(uint64_t)(tile_elements - 1)) +
                       (uint64_t)(blockIdx.x - tensor.first_tile) * (uint64_t)tile_elements;
  tile.stream = tensor.stream;
  // Place of the tile's first element within the tensor; negative if the tile begins before the tensor.
  const int64_t at = (int64_t)(tile.first_element - tensor.first_element);
  const int64_t bytes = at * (int64_t)sizeof(typename Storage::Element);
  OctetMemory &memory = tile.memory;
  memory.in = tensor.in ? tensor.in + bytes : 0;
  memory.out = tensor.out + bytes;
  memory.out_minus = tensor.out_minus ? tensor.out_minus + bytes : 0;
  memory.residual = tensor.residual ? tensor.residual + bytes : 0;
  memory.residual_out = tensor.residual_out ? tensor.residual_out + bytes : 0;
  memory.in_stride = memory.out_stride = memory.out_minus_stride = 1;
  memory.begin = at < 0 ? (int32_t)-at : 0;
  memory.end = tensor.numel - at < tile_elements ? (int32_t)(tensor.numel - at) : (int32_t)tile_elements;
  memory.whole =
      (((uint64_t)memory.in | (uint64_t)memory.out | (uint64_t)memory.out_minus | (uint64_t)memory.residual) &
       15u) == 0;
  return tile;
}

// The memory of one octet of a tile.
template <typename Storage> FK_DEVICE OctetMemory octet_memory(const FlatTile &tile, int32_t octet) {
  const int64_t bytes = (int64_t)octet * (int64_t)(kOctet * sizeof(typename Storage::Element));
  OctetMemory memory;
  memory.in = tile.memory.in ? tile.memory.in + bytes : 0;
  memory.out = tile.memory.out + bytes;
  memory.out_minus = tile.memory.out_minus ? tile.memory.out_minus + bytes : 0;
  memory.residual = tile.memory.residual ? tile.memory.residual + bytes : 0;
  memory.residual_out = tile.memory.residual_out ? tile.memory.residual_out + bytes : 0;
  memory.in_stride = memory.out_stride = memory.out_minus_stride = 1;
  memory.begin = tile.memory.begin - octet * kOctet;
  memory.end = tile.memory.end - octet * kOctet;
  memory.whole = tile.memory.whole && memory.begin <= 0 && memory.end >= kOctet;
  return memory;
}

FK_DEVICE uint32_t group_high(uint64_t element, int shift) { return (uint32_t)(element >> shift >> 32); }
FK_DEVICE uint32_t group_low(uint64_t element, int shift) { return (uint32_t)(element >> shift); }
