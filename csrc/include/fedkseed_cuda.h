// The C ABI of the native CUDA library; fedkseed.h describes tensors and codes.
// fedkseed_kernels/backends/c_abi.py declares the same structs with ctypes.
//
// Tensors, rows and the pointers marked "device" are memory of one GPU. No function allocates or synchronises, so
// a call may be captured into a CUDA graph. Return values: 0, a negative FK_ERROR_*, or a positive cudaError_t.
#pragma once

#include "fedkseed.h"

#if defined(__cplusplus)
extern "C" {
#endif

#define FK_CUDA_MAX_TERMS_BY_VALUE 64

typedef struct fk_cuda_terms {
  const uint64_t *seeds; // [count]; device memory if seeds_on_device
  const double *coeffs; // [count]; device memory if coeffs_on_device, where NaN and infinite ones are skipped
  int64_t count;        // K; at most FK_CUDA_MAX_TERMS_BY_VALUE unless both are on the device
  double alpha;         // already rounded to fp32; read if device_alpha is NULL
  const double *device_alpha;
  uint64_t rounding_seed; // read if device_rounding_seed is NULL
  const uint64_t *device_rounding_seed;
  // Device, or NULL: each call adds the number of its NaN and infinite coefficients.
  int32_t *num_skipped;
  int32_t seeds_on_device;
  int32_t coeffs_on_device;
  int32_t family;
  int32_t rounding;
} fk_cuda_terms;

// Versions as CUDA encodes them (13000 for 13.0); the driver's is 0 without a driver. Neither touches a
// device.
int32_t fk_cuda_driver_version(int32_t *version);
int32_t fk_cuda_runtime_version(int32_t *version);

// The meaning of a positive return value.
const char *fk_cuda_error_string(int32_t error);

// Loads every kernel on a device, also while this thread captures a graph.
int32_t fk_cuda_load(int32_t device);

// The primitive (contract section 6) over a list of tensors, on a cudaStream_t of a device.
// rows: NULL, or sizes[0] device indices used by every tensor of the list; num_source_rows: rows that `in` has.
// An index outside [0, num_source_rows) is not followed: its output row is NaN.
int32_t fk_cuda_seed_axpy(const fk_tensor *tensors, int64_t num_tensors, const int64_t *rows,
                          int64_t num_source_rows, const fk_cuda_terms *terms, int32_t device,
                          void *cuda_stream);

// Test-only: the functions of fedkseed.h, on device memory. The digest is added to *digest.
int32_t fk_cuda_philox_words(const uint32_t *counters, const uint32_t *keys, uint32_t *out, int64_t count,
                             int32_t device, void *cuda_stream);
int32_t fk_cuda_normal_from_words(const uint32_t *words, float *out, int64_t count, int32_t device,
                                  void *cuda_stream);
int32_t fk_cuda_normal_digest(uint64_t first, uint64_t count, uint64_t *digest, int32_t device,
                              void *cuda_stream);

#if defined(__cplusplus)
}
#endif
