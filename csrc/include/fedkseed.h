// The C ABI of the native libraries. Raw pointers, no torch, no Python, no C++ types.
// fedkseed_kernels/backends/c_abi.py declares the same structs with ctypes; tests/test_native.py pins their layout.
//
// The functions do not check again what the Python wrappers (fedkseed_kernels/ops.py) have checked: shapes, dtypes,
// overlaps, finite coefficients. They return 0, or a negative FK_ERROR_*.
#pragma once

#include <stdint.h>

#if defined(__cplusplus)
extern "C" {
#endif

#define FK_ABI_VERSION 4
#define FK_CONTRACT_VERSION 1
#define FK_MAX_DIMS 16

#define FK_ERROR_ARGUMENT -1 // a code below is unknown, too many terms, residuals or outputs that do not fit
#define FK_ERROR_ISA -2      // the requested instruction set was not built, or this machine lacks it
#define FK_ERROR_MEMORY -3   // a bookkeeping allocation (O(number of tensors + K)) failed

enum fk_dtype { FK_FP32 = 0, FK_BF16 = 1, FK_FP16 = 2, FK_FP64 = 3 };
enum fk_family { FK_GAUSSIAN = 0, FK_RADEMACHER = 1 };
enum fk_rounding { FK_NEAREST = 0, FK_STOCHASTIC = 1 };
enum fk_isa { FK_ISA_AUTO = -1, FK_ISA_BASELINE = 0, FK_ISA_AVX2 = 1, FK_ISA_AVX512 = 2, FK_NUM_ISAS = 3 };

// One tensor of a list. Output element i (row-major over sizes, numel in all) reads `in`, writes `out` and,
// for a pair, `out_minus`. Strides are in elements.
//   ndim == 0: flat. Memory is contiguous everywhere, and output element i has element index first_element + i.
//   ndim >= 1: element index = first_element + sum_d x_d * element_strides[d], with x_0 = rows[i_0] when
//              rows is given (x_d = i_d otherwise); `in` is addressed with x, the outputs with i.
typedef struct fk_tensor {
  const void *in;  // NULL: y = acc (used to write the noise itself)
  void *out;       // may equal in
  void *out_minus; // NULL unless both sides are wanted
  // Compensated weights (bf16, fp16; contract section 6.5): the residuals of `in`, with the same strides; or NULL.
  const int16_t *residual;
  // NULL: y is rounded into out (and out_minus), and residuals are only read. Otherwise it must equal residual, out
  // must equal in, and out_minus must be NULL: y is split into weight and residual, and both are written.
  int16_t *residual_out;
  int64_t numel;
  int64_t first_element;
  uint32_t stream;
  int32_t dtype;
  int32_t ndim;
  // The dtype of out and out_minus: dtype; or FK_FP32 for bf16 and fp16 weights (wide outputs: y is not rounded).
  int32_t out_dtype;
  int64_t sizes[FK_MAX_DIMS];
  int64_t in_strides[FK_MAX_DIMS];
  int64_t out_strides[FK_MAX_DIMS];
  int64_t out_minus_strides[FK_MAX_DIMS];
  int64_t element_strides[FK_MAX_DIMS];
} fk_tensor;

typedef struct fk_terms {
  const uint64_t *seeds; // [count]
  const double *coeffs;  // [count], finite
  int64_t count;         // K, 0 allowed; at most 2^24 of Rademacher noise
  double alpha;          // already rounded to fp32
  int32_t family;
  int32_t rounding;
  uint64_t rounding_seed;
} fk_terms;

// The type of libtorch's C function torch_parallel_for (torch >= 2.10); NULL runs all on the calling thread.
typedef int32_t (*fk_parallel_for)(int64_t begin, int64_t end, int64_t grain,
                                   void (*body)(int64_t begin, int64_t end, void *context), void *context);

int32_t fk_abi_version(void);
int32_t fk_contract_version(void);

// Bit i set: instruction set i was built in / can run on this machine.
int32_t fk_cpu_isas_built(void);
int32_t fk_cpu_isas_usable(void);

// The primitive (contract section 6) over a list of tensors. rows: NULL, or sizes[0] indices used by every
// tensor of the list. isa: an fk_isa.
int32_t fk_cpu_seed_axpy(const fk_tensor *tensors, int64_t num_tensors, const int64_t *rows,
                         const fk_terms *terms, int32_t isa, fk_parallel_for parallel_for);

// Test-only. Raw Philox words: out[4 * i ..] for counters[4 * i ..] and keys[2 * i ..].
int32_t fk_cpu_philox_words(const uint32_t *counters, const uint32_t *keys, uint32_t *out, int64_t count,
                            int32_t isa);

// Test-only. The Gaussian transform of chosen words: out[2 * i], out[2 * i + 1] = even, odd of words[i].
int32_t fk_cpu_normal_from_words(const uint32_t *words, float *out, int64_t count, int32_t isa);

// Test-only. A 64-bit digest of the transforms of words first .. first + count - 1, equal wherever all output bits
// are: the sum over words of (bits(even) + 2^32 bits(odd)) * (2 word + 1) mod 2^64.
int32_t fk_cpu_normal_digest(uint64_t first, uint64_t count, int32_t isa, uint64_t *digest);

#if defined(__cplusplus)
}
#endif
