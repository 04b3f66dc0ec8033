// What the kernels take from CUDA beyond C++. tests/cuda_shim stands in for it where they are compiled for a
// host.
#pragma once

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#define FK_LAUNCH(kernel, blocks, threads, cuda_stream, argument)                                            \
  kernel<<<(unsigned)(blocks), (unsigned)(threads), 0, (cudaStream_t)(cuda_stream)>>>(argument)
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
