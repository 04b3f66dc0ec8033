// fp64 tensors are rare: the kernels for many terms serve every number of terms.
#include "instantiate.h"

const Kernels kFp64Kernels = {
    {FK_MANY(Fp64), FK_MANY(Fp64), FK_MANY(Fp64)},
    {0, 0},
    FK_STRIDED(Fp64),
    {FK_MANY_TILE(Fp64), FK_MANY_TILE(Fp64), FK_MANY_TILE(Fp64)},
    kStridedThreads,
    load_common<Fp64>,
};
