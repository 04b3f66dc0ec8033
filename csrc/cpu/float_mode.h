// The contract keeps subnormals and rounds to nearest, whatever mode the caller's thread has set. So each worker
// enters the default floating-point mode, and restores the mode and sticky flags that it found.
#pragma once

#include <stdint.h>

#if defined(__x86_64__)
#include <xmmintrin.h>

typedef uint32_t fk_float_mode;
static inline fk_float_mode fk_enter_float_mode() {
  const fk_float_mode before = _mm_getcsr();
  _mm_setcsr(0x1F80u); // nearest even, all exceptions masked, neither flush-to-zero nor denormals-are-zero
  return before;
}
static inline void fk_leave_float_mode(fk_float_mode before) { _mm_setcsr(before); }

#elif defined(__aarch64__)

typedef uint64_t fk_float_mode;
static inline fk_float_mode fk_enter_float_mode() {
  fk_float_mode before;
  __asm__ __volatile__("mrs %0, fpcr" : "=r"(before));
  __asm__ __volatile__("msr fpcr, %0" : : "r"((fk_float_mode)0));
  return before;
}
static inline void fk_leave_float_mode(fk_float_mode before) {
  __asm__ __volatile__("msr fpcr, %0" : : "r"(before));
}

#else
#error "fedkseed-kernels knows the floating-point control register of x86-64 and aarch64 only"
#endif
