// The kernels of one dtype, as a table from which the plan (plan.h) launches them.
#pragma once

#include "arguments.h"
#include "target.h"

// The kernels for flat tensors, by number of terms.
enum Loop { kOneTerm, kTwoTerms, kManyTerms, kNumLoops };

struct Kernels {
  void (*flat[kNumLoops][2])(const FlatLaunch &launch, uint32_t num_tiles,
                             void *cuda_stream); // by Loop, fk_family
  // By fk_family: one term, compensated weights. NULL if the dtype has no residuals.
  void (*compensated[2])(const FlatLaunch &launch, uint32_t num_tiles, void *cuda_stream);
  void (*strided[2])(const StridedLaunch &launch, uint32_t num_tiles, void *cuda_stream); // by fk_family
  int64_t flat_tile[kNumLoops][2]; // elements of a tile
  int64_t strided_tile;            // slots of a tile
  int32_t (*load)(void);           // a cudaError_t
};

extern const Kernels kFp32Kernels, kBf16Kernels, kFp16Kernels, kFp64Kernels;
