#include "vector_avx2.h"

#include "kernels.inc"

extern const fk_kernels fk_kernels_avx2 = FK_KERNEL_TABLE;
