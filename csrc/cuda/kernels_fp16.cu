#include "kernels_of.h"

const Kernels kFp16Kernels = {
    {FK_FEW(Fp16, 1), FK_FEW(Fp16, 2), FK_MANY(Fp16)},
    FK_STRIDED(Fp16),
    {kFewTile, kFewTile, ManyPieces<Fp16::Arithmetic>::kTile},
    kStridedThreads,
    load_with_few<Fp16>,
};
