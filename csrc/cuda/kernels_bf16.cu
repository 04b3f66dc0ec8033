#include "instantiate.h"

const Kernels kBf16Kernels = {
    {FK_FEW(Bf16, 1), FK_FEW(Bf16, 2), FK_MANY(Bf16)}, FK_COMPENSATED(Bf16), FK_STRIDED(Bf16),
    {FK_FEW_TILE, FK_FEW_TILE, FK_MANY_TILE(Bf16)},    kStridedThreads,      load_with_compensated<Bf16>,
};
