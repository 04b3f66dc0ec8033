// Instantiates the kernels of one dtype. Each dtype has a source that includes this, so that they compile in parallel.
#pragma once

#include "few_terms.h"
#include "kernels.h"
#include "many_gaussian.h"
#include "many_rademacher.h"
#include "strided.h"

template <void (*kernel)(const FlatLaunch)>
void launch_flat(const FlatLaunch &launch, uint32_t num_tiles, void *cuda_stream) {
  FK_LAUNCH(kernel, num_tiles, kThreads, cuda_stream, launch);
}

template <void (*kernel)(const StridedLaunch)>
void launch_strided(const StridedLaunch &launch, uint32_t num_tiles, void *cuda_stream) {
  FK_LAUNCH(kernel, num_tiles, kStridedThreads, cuda_stream, launch);
}

template <typename Kernel> void load_kernel(Kernel kernel, cudaError_t &error) {
  cudaFuncAttributes attributes;
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, (const void *)kernel);
}

template <typename Storage> int32_t load_common() {
  cudaError_t error = cudaSuccess;
  load_kernel(many_gaussian<Storage>, error);
  load_kernel(many_rademacher<Storage>, error);
  load_kernel(strided<Storage, Gaussian>, error);
  load_kernel(strided<Storage, Rademacher>, error);
  return (int32_t)error;
}

template <typename Storage> int32_t load_with_few() {
  cudaError_t error = (cudaError_t)load_common<Storage>();
  load_kernel(few_terms<Storage, Gaussian, 1, false>, error);
  load_kernel(few_terms<Storage, Gaussian, 2, false>, error);
  load_kernel(few_terms<Storage, Rademacher, 1, false>, error);
  load_kernel(few_terms<Storage, Rademacher, 2, false>, error);
  return (int32_t)error;
}

template <typename Storage> int32_t load_with_compensated() {
  cudaError_t error = (cudaError_t)load_with_few<Storage>();
  load_kernel(few_terms<Storage, Gaussian, 1, true>, error);
  load_kernel(few_terms<Storage, Rademacher, 1, true>, error);
  return (int32_t)error;
}

#define FK_MANY(Storage) {launch_flat<many_gaussian<Storage>>, launch_flat<many_rademacher<Storage>>}
#define FK_FEW(Storage, terms)                                                                               \
  {launch_flat<few_terms<Storage, Gaussian, terms, false>>,                                                  \
   launch_flat<few_terms<Storage, Rademacher, terms, false>>}
#define FK_COMPENSATED(Storage)                                                                              \
  {launch_flat<few_terms<Storage, Gaussian, 1, true>>, launch_flat<few_terms<Storage, Rademacher, 1, true>>}
#define FK_STRIDED(Storage)                                                                                  \
  {launch_strided<strided<Storage, Gaussian>>, launch_strided<strided<Storage, Rademacher>>}
#define FK_FEW_TILE {kFewTile, kFewTile}
#define FK_MANY_TILE(Storage) {ManyOctets<Storage::Arithmetic>::kTile, kRademacherTile}
