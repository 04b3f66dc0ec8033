// What a launch is handed, as kernel parameters: the terms, and as many tensors as fit beside them.
#pragma once

#include "fedkseed_cuda.h"
#include "target.h"

// A kernel's parameters hold at most this many bytes: within the 32,764 that every GPU served here allows.
#define FK_PARAMETER_BYTES 24000

struct TermArguments {
  const uint64_t *seeds; // device memory, or NULL: those by value
  const double *coeffs;
  const double *device_alpha;
  const uint64_t *device_rounding_seed;
  int32_t *num_skipped; // NULL unless this launch is the one that counts
  int64_t count;
  double alpha;
  uint64_t rounding_seed;
  int32_t stochastic;
  uint64_t seeds_by_value[FK_CUDA_MAX_TERMS_BY_VALUE];
  double coeffs_by_value[FK_CUDA_MAX_TERMS_BY_VALUE];
};

// A tensor whose memory is contiguous in the order of its elements.
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

// Any other tensor: rows of consecutive elements, each covered by a fixed number of slots (one octet of noise
// each).
struct StridedTensor {
  fk_tensor tensor;
  int64_t run_length;
  int64_t slots_per_run;
  int64_t num_slots;
  uint32_t first_tile;
  int32_t first_dim; // the dimensions before it count rows; the one at it, if any, is the row
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

// The last tensor whose tiles begin at or before `tile`.
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
