// Stands in for the CUDA runtime where csrc/cuda is compiled for a host: the kernels themselves run, one
// block after the other, the threads of a block as fibers that switch at barriers. csrc/cuda/target.h includes it.
#pragma once

#include <stdint.h>

#include <functional>

#define __global__ static
#define __device__
#define __forceinline__ inline __attribute__((always_inline))
#define __shared__ static
#define __launch_bounds__(...)
#define __grid_constant__

struct fk_shim_index {
  unsigned x;
};
extern fk_shim_index threadIdx, blockIdx, gridDim;

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
static inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

// A barrier: the running thread continues once all threads of its block have called this.
void __syncthreads();

template <typename T, typename U> static inline T atomicAdd(T *target, U value) {
  const T before = *target;
  *target += (T)value;
  return before;
}

template <typename T> static inline T atomicOr(T *target, T value) {
  const T before = *target;
  *target |= value;
  return before;
}

template <typename T> static inline T atomicMax(T *target, T value) {
  const T before = *target;
  if (value > before) *target = value;
  return before;
}

// sums[16 rows x 8 columns] += rows[16 x 32 bytes, unsigned] columns[32 x 8, signed] by the 32 threads of a warp,
// which all call this; each holds the part of the matrices that csrc/cuda/matrix.h says. Also a barrier.
void fk_shim_multiply_accumulate(int32_t (&sums)[4], const uint32_t (&rows)[4], const uint32_t (&columns)[2]);

// The value of the thread whose index differs by `bit`. Also a barrier.
uint32_t fk_shim_exchange(uint32_t value, unsigned bit);

typedef void *cudaStream_t;
enum cudaError_t { cudaSuccess = 0, cudaErrorLaunchFailure = 719 };
struct cudaFuncAttributes {};
enum cudaStreamCaptureMode { cudaStreamCaptureModeGlobal = 0, cudaStreamCaptureModeRelaxed = 2 };

// Runs a kernel's body for every thread of every block.
void fk_shim_run(unsigned blocks, unsigned threads, const std::function<void()> &body);
cudaError_t cudaGetLastError();
const char *cudaGetErrorString(cudaError_t error);

// The current device, of as many as are asked for; each cudaSetDevice is kept (fk_shim_devices_set).
cudaError_t cudaGetDevice(int *device);
cudaError_t cudaSetDevice(int device);
static inline cudaError_t cudaDriverGetVersion(int *version) {
  *version = 13000;
  return cudaSuccess;
}
static inline cudaError_t cudaRuntimeGetVersion(int *version) {
  *version = 13000;
  return cudaSuccess;
}
// What fk_shim_load_status has chosen; an error is also the last one.
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes *, const void *);

static inline cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode *) { return cudaSuccess; }

#define FK_LAUNCH(kernel, blocks, threads, cuda_stream, argument)                                            \
  do {                                                                                                       \
    (void)(cuda_stream);                                                                                     \
    fk_shim_run((unsigned)(blocks), (unsigned)(threads), [&] { kernel(argument); });                         \
  } while (0)
