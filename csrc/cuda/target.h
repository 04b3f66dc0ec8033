// What the kernels take from the target that they are compiled for: CUDA, or tests/cuda_shim, which stands in for it
// on a host.
#pragma once

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#define FK_LAUNCH(kernel, blocks, threads, cuda_stream, argument)                                            \
  kernel<<<(unsigned)(blocks), (unsigned)(threads), 0, (cudaStream_t)(cuda_stream)>>>(argument)
#else
#include <cuda_shim.h>
#endif

#include "platform.h"

// Tells the compiler that a pointer points to global memory: it cannot see that of one read from shared memory.
#if defined(__CUDA_ARCH__)
#define FK_ASSUME_GLOBAL(pointer) __builtin_assume(__isGlobal(pointer))
#else
#define FK_ASSUME_GLOBAL(pointer) (void)(pointer)
#endif

#define FK_DEVICE __device__ __forceinline__
