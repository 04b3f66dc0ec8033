// What the kernels take from the target that they are compiled for: CUDA, or tests/cuda_shim, which stands in for it
// on a host.
#pragma once

#if defined(__CUDACC__)
#include <cuda_runtime.h>
// Not by <<<>>>: what nvcc 13 makes of that keeps a static of its own for each kernel, whose guard needs the C++
// runtime. See the flags in setup.py.
#define FK_LAUNCH(kernel, blocks, threads, cuda_stream, argument)                                            \
  do {                                                                                                       \
    void *launch_arguments[] = {(void *)&(argument)};                                                        \
    cudaLaunchKernel((const void *)(kernel), dim3((unsigned)(blocks)), dim3((unsigned)(threads)),            \
                     launch_arguments, 0, (cudaStream_t)(cuda_stream));                                      \
  } while (0)
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
