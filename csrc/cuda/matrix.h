// Matrix products of bytes by a warp, and exchanges between its threads.
#pragma once

#include "target.h"

constexpr int kMatrixTerms = 32; // terms that one product sums over
constexpr int kMatrixColumns = 8;

// The part of a product of 16 rows and 8 columns that a thread holds. In thread 4 g + t of a warp, w[0] and w[1] are
// columns 2 t and 2 t + 1 of row g, and w[2] and w[3] the same columns of row g + 8.
struct MatrixSums {
  int32_t w[4];
};

// sums += rows columns. Each byte of an argument is a term, unsigned in rows, signed in columns. Thread 4 g + t holds
//   rows[0]: terms 4 t .. 4 t + 3 of row g;     rows[1]: the same terms of row g + 8;
//   rows[2]: terms 16 + 4 t .. of row g;        rows[3]: the same terms of row g + 8;
//   columns[0]: terms 4 t .. of column g;       columns[1]: terms 16 + 4 t .. of column g.
// Sums wrap.
FK_DEVICE void multiply_accumulate(MatrixSums &sums, const uint32_t (&rows)[4],
                                   const uint32_t (&columns)[2]) {
#if defined(__CUDACC__)
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+r"(sums.w[0]), "+r"(sums.w[1]), "+r"(sums.w[2]), "+r"(sums.w[3])
      : "r"(rows[0]), "r"(rows[1]), "r"(rows[2]), "r"(rows[3]), "r"(columns[0]), "r"(columns[1]));
#else
  fk_shim_multiply_accumulate(sums.w, rows, columns);
#endif
}

// The value of the thread whose number in the warp differs by `bit`.
FK_DEVICE uint32_t exchange(uint32_t value, unsigned bit) {
#if defined(__CUDACC__)
  return __shfl_xor_sync(0xFFFFFFFFu, value, (int)bit);
#else
  return fk_shim_exchange(value, bit);
#endif
}

FK_DEVICE uint64_t exchange(uint64_t value, unsigned bit) {
  return (uint64_t)exchange((uint32_t)(value >> 32), bit) << 32 | exchange((uint32_t)value, bit);
}

FK_DEVICE void add_total(uint32_t &total, uint32_t value) { atomicAdd(&total, value); }
FK_DEVICE void add_total(uint64_t &total, uint64_t value) {
  atomicAdd((unsigned long long *)&total, (unsigned long long)value);
}

// Four of the eight bytes of low and high: hexadecimal digit i of the selector is the number of byte i.
FK_DEVICE uint32_t select_bytes(uint32_t low, uint32_t high, uint32_t selector) {
#if defined(__CUDA_ARCH__)
  return __byte_perm(low, high, selector);
#else
  const uint64_t bytes = (uint64_t)high << 32 | low;
  uint32_t selected = 0;
  for (int i = 0; i < 4; ++i) selected |= (uint32_t)(bytes >> 8 * (selector >> 4 * i & 7) & 0xFF) << 8 * i;
  return selected;
#endif
}

struct ByteMatrix {
  uint32_t row[4];
};

// Byte i of row b is byte b of word i.
FK_DEVICE ByteMatrix transposed(const uint32_t (&words)[4]) {
  const uint32_t low_first = select_bytes(words[0], words[1], 0x5140);
  const uint32_t low_second = select_bytes(words[2], words[3], 0x5140);
  const uint32_t high_first = select_bytes(words[0], words[1], 0x7362);
  const uint32_t high_second = select_bytes(words[2], words[3], 0x7362);
  return {{select_bytes(low_first, low_second, 0x5410), select_bytes(low_first, low_second, 0x7632),
           select_bytes(high_first, high_second, 0x5410), select_bytes(high_first, high_second, 0x7632)}};
}
