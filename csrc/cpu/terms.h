// The terms of a call made ready for the kernels of one dtype class: coefficients rounded to the class's
// arithmetic, terms that do not count dropped, round keys computed. One allocation of about 110 bytes a term.
#pragma once

#include "kernels.h"

typedef struct fk_ready_sides {
  fk_ready_terms plus;
  fk_ready_terms minus; // every coefficient negated; for Gaussian noise only
  void *memory;
} fk_ready_sides;

// fp64: coefficients stay fp64; otherwise each is rounded to fp32. lookup_terms: that of the fk_kernels which will
// take the terms. Returns 0 or FK_ERROR_MEMORY.
int32_t fk_make_ready_terms(const fk_terms *terms, int fp64, int64_t lookup_terms, fk_ready_sides *out);
void fk_free_ready_terms(fk_ready_sides *sides);
