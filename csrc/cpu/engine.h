// The loop over a list of tensors, shared by all instruction sets: chunks for the thread pool, runs and blocks inside
// a chunk, strides and views, flush-to-zero modes. It holds no vector code.
#pragma once

#include "kernels.h"

// Runs the primitive; the caller has resolved the kernel table. Returns 0 or FK_ERROR_*.
int32_t fk_run_seed_axpy(const fk_tensor *tensors, int64_t num_tensors, const int64_t *rows,
                         const fk_terms *terms, const fk_kernels *kernels, fk_parallel_for parallel_for);
