#include "vector_avx512.h"

#include "kernels.inc"

extern const fk_kernels fk_kernels_avx512 = FK_KERNEL_TABLE;
