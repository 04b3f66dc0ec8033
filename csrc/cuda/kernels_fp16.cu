#include "instantiate.h"

const Kernels kFp16Kernels = {
    {FK_FEW(Fp16, 1), FK_FEW(Fp16, 2), FK_MANY(Fp16)}, FK_COMPENSATED(Fp16), FK_STRIDED(Fp16),
    {FK_FEW_TILE, FK_FEW_TILE, FK_MANY_TILE(Fp16)},    kStridedThreads,      load_with_compensated<Fp16>,
};
