// The parameters of a launch: the terms, and as many tensors as fit beside them.
#pragma once

#include "fedkseed_cuda.h"
#include "target.h"

// The most bytes that the parameters of a kernel take; every GPU served here allows 32,764.
#define FK_PARAMETER_BYTES 24000

struct TermArguments {
  const uint64_t *seeds; // device memory; NULL: seeds_by_value
  const double *coeffs;  // device memory; NULL: coeffs_by_value
  const double *device_alpha;
  const uint64_t *device_rounding_seed;
  int32_t *num_skipped; // NULL but in the one launch of a call that counts skipped terms
  int64_t count;
  double alpha;
  uint64_t rounding_seed;
  int32_t stochastic;
  uint64_t seeds_by_value[FK_CUDA_MAX_TERMS_BY_VALUE];
  double coeffs_by_value[FK_CUDA_MAX_TERMS_BY_VALUE];
};

// A flat tensor: contiguous in the order of its elements.
struct FlatTensor {
  const char *in;
  char *out, *out_minus;
  const char *residual;
  char *residual_out;
  uint64_t first_element;
  int64_t numel;
  uint32_t stream;
  uint32_t first_tile;
};

// A strided tensor, which is any other: runs of consecutive elements. A fixed number of slots covers each run; a slot
// is the part of a run in one octet of noise.
struct StridedTensor {
  fk_tensor tensor;
  int64_t run_length;
  int64_t slots_per_run;
  int64_t num_slots;
  uint32_t first_tile;
  int32_t first_dim; // dimensions before it number the runs; the one at it, if there is one, is the run
};

constexpr int32_t kMaxFlatTensors =
    (FK_PARAMETER_BYTES - (int32_t)sizeof(TermArguments) - 8) / (int32_t)sizeof(FlatTensor);
constexpr int32_t kMaxStridedTensors =
    (FK_PARAMETER_BYTES - (int32_t)sizeof(TermArguments) - 24) / (int32_t)sizeof(StridedTensor);

struct FlatLaunch {
  TermArguments terms;
  int32_t num_tensors;
  FlatTensor tensors[kMaxFlatTensors];
};

struct StridedLaunch {
  TermArguments terms;
  const int64_t *rows; // device memory, or NULL
  int64_t num_source_rows;
  int32_t num_tensors;
  StridedTensor tensors[kMaxStridedTensors];
};

static_assert(sizeof(FlatLaunch) <= FK_PARAMETER_BYTES, "the flat table outgrows its parameter");
static_assert(sizeof(StridedLaunch) <= FK_PARAMETER_BYTES, "the strided table outgrows its parameter");

// The tensor that a tile belongs to: the last one whose tiles begin at or before it.
template <typename Tensor>
FK_DEVICE const Tensor &tensor_of_tile(const Tensor *tensors, int32_t num_tensors, uint32_t tile) {
  int32_t low = 0, high = num_tensors;
  while (high - low > 1) {
    const int32_t middle = (low + high) >> 1;
    if (tensors[middle].first_tile <= tile) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return tensors[low];
}
