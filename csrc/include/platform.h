// What lets the same code of the contract compile with a host compiler and with nvcc: function qualifiers, bit
// casts, and fma, which rounds once. Compile with contraction off (-ffp-contract=off, -fmad=false): every fma is
// explicit.
#pragma once

#include <stdint.h>

#if defined(__CUDACC__)
#define FK_HD __host__ __device__ __forceinline__
#else
#define FK_HD static inline __attribute__((always_inline))
#endif

FK_HD float fk_float_from_bits(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
#endif
}

FK_HD uint32_t fk_bits_from_float(float value) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(value);
#else
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  return bits;
#endif
}

FK_HD double fk_double_from_bits(uint64_t bits) {
#if defined(__CUDA_ARCH__)
  return __longlong_as_double((long long)bits);
#else
  double value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
#endif
}

FK_HD uint64_t fk_bits_from_double(double value) {
#if defined(__CUDA_ARCH__)
  return (uint64_t)__double_as_longlong(value);
#else
  uint64_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  return bits;
#endif
}

// (x & mask) | base. On a GPU this is one instruction, which the compiler does not find if mask and base are constants.
FK_HD uint32_t fk_and_or(uint32_t x, uint32_t mask, uint32_t base) {
#if defined(__CUDA_ARCH__)
  uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(result) : "r"(x), "r"(mask), "r"(base));
  return result;
#else
  return (x & mask) | base;
#endif
}

// a b + c, rounded once, to nearest even. On a host without an fma instruction, libm has an exact function.
FK_HD float fk_fma(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(a, b, c);
#else
  return __builtin_fmaf(a, b, c);
#endif
}

FK_HD double fk_fma64(double a, double b, double c) {
#if defined(__CUDA_ARCH__)
  return __fma_rn(a, b, c);
#else
  return __builtin_fma(a, b, c);
#endif
}
