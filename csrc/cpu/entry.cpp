// The exported functions, and which kernel table they run: one that was built (FK_HAVE_*, set by the build), that
// this processor can run, and that the caller asked for.
#include "engine.h"
#include "float_mode.h"
#include "integer_sums.h"
#include "normal.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#define FK_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

// Instruction sets of this processor: everything that -march=x86-64-v3 and -v4 let the compiler use. It is read from
// cpuid, because __builtin_cpu_supports has been wrong with some compilers.
int32_t detect_isas() {
  int32_t isas = 1 << FK_ISA_BASELINE;
#if defined(__x86_64__)
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return isas;
  const unsigned leaf1 = bit_FMA | bit_CMPXCHG16B | bit_MOVBE | bit_POPCNT | bit_OSXSAVE | bit_AVX | bit_F16C;
  if ((c & leaf1) != leaf1) return isas;
  unsigned low, high;
  __asm__ __volatile__("xgetbv" : "=a"(low), "=d"(high) : "c"(0)); // register state that the system saves
  unsigned e = 0;
  if (!__get_cpuid(0x80000001u, &a, &b, &e, &d) || !(e & bit_LZCNT)) return isas;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return isas;
  const unsigned v3 = bit_AVX2 | bit_BMI | bit_BMI2;
  if ((low & 0x06u) != 0x06u || (b & v3) != v3) return isas;
  isas |= 1 << FK_ISA_AVX2;
  const unsigned v4 = bit_AVX512F | bit_AVX512BW | bit_AVX512CD | bit_AVX512DQ | bit_AVX512VL;
  if ((low & 0xE6u) == 0xE6u && (b & v4) == v4) isas |= 1 << FK_ISA_AVX512;
#endif
  return isas;
}

// Read once, when the library is loaded: cpuid is slow under a hypervisor.
const int32_t kDetectedIsas = detect_isas();

const fk_kernels *table(int32_t isa) {
  switch (isa) {
  case FK_ISA_BASELINE:
    return &fk_kernels_baseline;
#if defined(FK_HAVE_AVX2)
  case FK_ISA_AVX2:
    return &fk_kernels_avx2;
#endif
#if defined(FK_HAVE_AVX512)
  case FK_ISA_AVX512:
    return &fk_kernels_avx512;
#endif
  default:
    return 0;
  }
}

bool residuals_fit(const fk_tensor *t, const fk_terms *terms) {
  if (t->residual && t->dtype != FK_BF16 && t->dtype != FK_FP16) return false;
  return !t->residual_out || (t->residual_out == t->residual && t->out == t->in && !t->out_minus &&
                              terms->rounding == FK_NEAREST);
}

bool outputs_fit(const fk_tensor *t) {
  const bool is_half = t->dtype == FK_BF16 || t->dtype == FK_FP16;
  const bool has_input = t->in || t->numel == 0; // an empty tensor has no address
  return t->out_dtype == t->dtype || (t->out_dtype == FK_FP32 && is_half && has_input && !t->residual_out);
}

const fk_kernels *resolve(int32_t isa) {
  if (isa < FK_ISA_AUTO || isa >= FK_NUM_ISAS) return 0;
  const int32_t usable = fk_cpu_isas_usable();
  if (isa != FK_ISA_AUTO) return usable >> isa & 1 ? table(isa) : 0;
  for (int32_t best = FK_NUM_ISAS - 1; best > 0; --best) {
    if (usable >> best & 1) return table(best);
  }
  return table(FK_ISA_BASELINE);
}

} // namespace

FK_EXPORT int32_t fk_abi_version(void) { return FK_ABI_VERSION; }

FK_EXPORT int32_t fk_contract_version(void) { return FK_CONTRACT_VERSION; }

FK_EXPORT int32_t fk_cpu_isas_built(void) {
  int32_t built = 0;
  for (int32_t isa = 0; isa < FK_NUM_ISAS; ++isa) built |= (table(isa) != 0) << isa;
  return built;
}

FK_EXPORT int32_t fk_cpu_isas_usable(void) { return kDetectedIsas & fk_cpu_isas_built(); }

FK_EXPORT int32_t fk_cpu_seed_axpy(const fk_tensor *tensors, int64_t num_tensors, const int64_t *rows,
                                   const fk_terms *terms, int32_t isa, fk_parallel_for parallel_for) {
  if (terms->family != FK_GAUSSIAN && terms->family != FK_RADEMACHER) return FK_ERROR_ARGUMENT;
  if (terms->family == FK_RADEMACHER && terms->count > FK_SUM_MAX_TERMS) return FK_ERROR_ARGUMENT;
  if (terms->rounding != FK_NEAREST && terms->rounding != FK_STOCHASTIC) return FK_ERROR_ARGUMENT;
  for (int64_t i = 0; i < num_tensors; ++i) {
    if (tensors[i].dtype < FK_FP32 || tensors[i].dtype > FK_FP64) return FK_ERROR_ARGUMENT;
    if (tensors[i].ndim < 0 || tensors[i].ndim > FK_MAX_DIMS) return FK_ERROR_ARGUMENT;
    if (!residuals_fit(&tensors[i], terms) || !outputs_fit(&tensors[i])) return FK_ERROR_ARGUMENT;
  }
  const fk_kernels *kernels = resolve(isa);
  if (!kernels) return FK_ERROR_ISA;
  return fk_run_seed_axpy(tensors, num_tensors, rows, terms, kernels, parallel_for);
}

FK_EXPORT int32_t fk_cpu_philox_words(const uint32_t *counters, const uint32_t *keys, uint32_t *out,
                                      int64_t count, int32_t isa) {
  const fk_kernels *kernels = resolve(isa);
  if (!kernels) return FK_ERROR_ISA;
  kernels->philox_words(counters, keys, out, count);
  return 0;
}

FK_EXPORT int32_t fk_cpu_normal_from_words(const uint32_t *words, float *out, int64_t count, int32_t isa) {
  const fk_kernels *kernels = resolve(isa);
  if (!kernels) return FK_ERROR_ISA;
  const fk_float_mode mode = fk_enter_float_mode();
  kernels->normal_from_words(words, out, count);
  fk_leave_float_mode(mode);
  return 0;
}

FK_EXPORT int32_t fk_cpu_normal_digest(uint64_t first, uint64_t count, int32_t isa, uint64_t *digest) {
  const fk_kernels *kernels = resolve(isa);
  if (!kernels) return FK_ERROR_ISA;
  const fk_float_mode mode = fk_enter_float_mode();
  uint32_t words[512];
  float z[1024];
  uint64_t sum = 0;
  for (uint64_t done = 0; done < count;) {
    const uint64_t n = count - done < 512 ? count - done : 512;
    for (uint64_t i = 0; i < n; ++i) words[i] = (uint32_t)(first + done + i);
    kernels->normal_from_words(words, z, (int64_t)n);
    for (uint64_t i = 0; i < n; ++i) {
      const uint64_t even = fk_bits_from_float(z[2 * i]), odd = fk_bits_from_float(z[2 * i + 1]);
      sum += (even + (odd << 32)) * (2 * (uint64_t)words[i] + 1);
    }
    done += n;
  }
  fk_leave_float_mode(mode);
  *digest = sum;
  return 0;
}
