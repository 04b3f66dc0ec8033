#include "instantiate.h"

const Kernels kFp32Kernels = {
    {FK_FEW(Fp32, 1), FK_FEW(Fp32, 2), FK_MANY(Fp32)}, {0, 0},          FK_STRIDED(Fp32),
    {FK_FEW_TILE, FK_FEW_TILE, FK_MANY_TILE(Fp32)},    kStridedThreads, load_with_few<Fp32>,
};
