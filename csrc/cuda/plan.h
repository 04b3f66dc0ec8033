// Turns a list of tensors into launches: one for each dtype and kind of tensor (flat or strided, with or without
// residuals); more where the parameters or the grid of one are full.
#pragma once

#include "arguments.h"

// Makes all launches of a call, on the current device. Returns 0, FK_ERROR_ARGUMENT, or a cudaError_t.
int32_t fk_cuda_run(const fk_tensor *tensors, int64_t num_tensors, const int64_t *rows,
                    int64_t num_source_rows, const fk_cuda_terms *terms, void *cuda_stream);

// Loads the kernels of every dtype on the current device. Returns a cudaError_t.
int32_t fk_cuda_load_kernels(void);
