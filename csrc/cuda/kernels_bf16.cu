#include "kernels_of.h"

const Kernels kBf16Kernels = {
    {FK_FEW(Bf16, 1), FK_FEW(Bf16, 2), FK_MANY(Bf16)},
    FK_STRIDED(Bf16),
    {kFewTile, kFewTile, ManyPieces<Bf16::Arithmetic>::kTile},
    kStridedThreads,
    load_with_few<Bf16>,
};
