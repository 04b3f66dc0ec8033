// What the kernels take from CUDA beyond C++. tests/cuda_shim stands in for it where they are compiled for a
// host.
#pragma once

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#define FK_LAUNCH(kernel, blocks, threads, stream, argument)                                                 \
  kernel<<<(unsigned)(blocks), (unsigned)(threads), 0, (cudaStream_t)(stream)>>>(argument)
#else
#include <cuda_shim.h>
#endif

#include "platform.h"

// The compiler loses sight of what a pointer points to when it has been in shared memory.
#if defined(__CUDA_ARCH__)
#define FK_ASSUME_GLOBAL(pointer) __builtin_assume(__isGlobal(pointer))
#else
#define FK_ASSUME_GLOBAL(pointer) (void)(pointer)
#endif

#define FK_DEVICE __device__ __forceinline__

FK_DEVICE double fk_double_from_words(uint32_t low, uint32_t high) {
#if defined(__CUDA_ARCH__)
  return __hiloint2double((int)high, (int)low);
#else
  const uint64_t bits = (uint64_t)high << 32 | low;
  double value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
#endif
}

FK_DEVICE uint64_t fk_bits_from_double(double value) {
#if defined(__CUDA_ARCH__)
  return (uint64_t)__double_as_longlong(value);
#else
  uint64_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  return bits;
#endif
}
