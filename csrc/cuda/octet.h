// An octet in memory: its weights are read, y = alpha w + acc is computed, one or both sides are written.
#pragma once

#include "storage.h"
#include "term_scale.h"

struct OctetMemory {
  const char
      *in; // of the octet's first element, which may lie before the tensor. NULL: the noise itself is written
  char *out;
  char *out_minus;
  const char *residual;                            // with the stride of the weights; NULL: none
  char *residual_out;                              // equal to residual where y is split; NULL: not written
  int64_t in_stride, out_stride, out_minus_stride; // elements
  int32_t begin, end;                              // places in the octet that belong to the tensor
  bool whole;                                      // all eight do, contiguous and aligned to 16 bytes
};

// 16-byte accesses of a whole octet. Its pointers may come from shared memory, hence FK_ASSUME_GLOBAL.
template <typename Storage> FK_DEVICE typename Storage::Octet read_whole(const char *from) {
  FK_ASSUME_GLOBAL(from);
  typename Storage::Octet octet;
#pragma unroll
  for (int v = 0; v < (int)(sizeof octet / sizeof(uint4)); ++v) {
    ((uint4 *)octet.w)[v] = ((const uint4 *)from)[v];
  }
  return octet;
}

template <typename Storage> FK_DEVICE void write_whole(char *to, const typename Storage::Octet &octet) {
  FK_ASSUME_GLOBAL(to);
#pragma unroll
  for (int v = 0; v < (int)(sizeof octet / sizeof(uint4)); ++v) {
    ((uint4 *)to)[v] = ((const uint4 *)octet.w)[v];
  }
}

template <typename Element> FK_DEVICE Element read_element(const Element *from) {
  FK_ASSUME_GLOBAL(from);
  return *from;
}

template <typename Element> FK_DEVICE void write_element(Element *to, Element bits) {
  FK_ASSUME_GLOBAL(to);
  *to = bits;
}

// The eight elements at `from`; `otherwise` for those that the tensor lacks, or for all if `from` is NULL.
template <typename Storage> FK_DEVICE typename Storage::Octet
read_elements(const OctetMemory &memory, const char *from, typename Storage::Element otherwise) {
  using Element = typename Storage::Element;
  if (memory.whole && from) return read_whole<Storage>(from);
  typename Storage::Octet octet = {};
#pragma unroll
  for (int i = 0; i < kOctet; ++i) {
    Element bits = otherwise;
    if (from && i >= memory.begin && i < memory.end) {
      bits = read_element((const Element *)from + i * memory.in_stride);
    }
    Storage::set(octet, i, bits);
  }
  return octet;
}

// The weights; -0 where there are none: with alpha = 1 it leaves every sum as it is, a zero of either sign too.
template <typename Storage> FK_DEVICE typename Storage::Octet read_octet(const OctetMemory &memory) {
  return read_elements<Storage>(memory, memory.in, Storage::kNegativeZero);
}

template <typename Storage> FK_DEVICE void write_octet(const OctetMemory &memory, char *to, int64_t stride,
                                                       const typename Storage::Octet &octet) {
  if (memory.whole) {
    write_whole<Storage>(to, octet);
    return;
  }
#pragma unroll
  for (int i = 0; i < kOctet; ++i) {
    if (i >= memory.begin && i < memory.end) {
      write_element((typename Storage::Element *)to + i * stride, Storage::get(octet, i));
    }
  }
}

// Replaces acc by y = alpha w + acc.
template <typename Storage> FK_DEVICE void add_weights(typename Storage::Arithmetic (&acc)[kOctet],
                                                       typename Storage::Arithmetic alpha,
                                                       const typename Storage::Octet &weights) {
#pragma unroll
  for (int i = 0; i < kOctet; ++i) add_product(acc[i], alpha, Storage::widen(weights, i));
}

// Replaces acc by y of compensated weights (contract section 6.5).
template <typename Storage> FK_DEVICE void add_values(float (&acc)[kOctet], float alpha,
                                                      const typename Storage::Octet &weights,
                                                      const typename Storage::Octet &residuals) {
#pragma unroll
  for (int i = 0; i < kOctet; ++i) add_product(acc[i], alpha, Storage::value(weights, residuals, i));
}

// Random bits of an octet for stochastic rounding: words of the rounding seed. Otherwise rounding is to nearest.
struct RoundingBits {
  fk_words words;
  bool stochastic;
};

template <typename Storage>
FK_DEVICE void write_side(const OctetMemory &memory, char *to, int64_t stride,
                          const typename Storage::Octet &weights, typename Storage::Arithmetic alpha,
                          const typename Storage::Arithmetic (&acc)[kOctet], const RoundingBits &bits) {
  typename Storage::Arithmetic y[kOctet];
#pragma unroll
  for (int i = 0; i < kOctet; ++i) y[i] = acc[i];
  typename Storage::Octet rounded = {};
  if constexpr (Storage::kRounds) {
    if (memory.residual) {
      typename Storage::Octet residuals = read_elements<Storage>(memory, memory.residual, 0);
      add_values<Storage>(y, alpha, weights, residuals);
      if (memory.residual_out) {
        Storage::split(y, rounded, residuals);
        write_octet<Storage>(memory, memory.residual_out, memory.in_stride, residuals);
        write_octet<Storage>(memory, to, stride, rounded);
        return;
      }
    } else {
      add_weights<Storage>(y, alpha, weights);
    }
  } else {
    add_weights<Storage>(y, alpha, weights);
  }
  if (bits.stochastic) {
    Storage::round_stochastic(y, bits.words, rounded);
  } else {
    Storage::round_nearest(y, rounded);
  }
  write_octet<Storage>(memory, to, stride, rounded);
}

// Writes the weights unchanged to one or both outputs (contract section 6.1: no term counts, and alpha is 1).
template <typename Storage>
FK_DEVICE void copy_octet(const OctetMemory &memory, const typename Storage::Octet &weights) {
  write_octet<Storage>(memory, memory.out, memory.out_stride, weights);
  if (memory.out_minus) {
    write_octet<Storage>(memory, memory.out_minus, memory.out_minus_stride, weights);
  }
}

// The sums of one octet while terms are added, and the factor of a term: for Gaussian noise they are numbers and the
// coefficient, for Rademacher noise integers and the scaled coefficient.
template <typename Family, typename Arithmetic> struct OctetSums;

template <typename Arithmetic> struct OctetSums<Gaussian, Arithmetic> {
  using Factor = Arithmetic;
  Arithmetic acc[kOctet];

  FK_DEVICE void clear() {
#pragma unroll
    for (int i = 0; i < kOctet; ++i) acc[i] = (Arithmetic)-0.0;
  }
  FK_DEVICE void add(const fk_words &words, uint32_t, Factor coefficient) {
    add_gaussian(acc, words, coefficient);
  }
};

template <typename Arithmetic> struct OctetSums<Rademacher, Arithmetic> {
  using Factor = typename Integers<Arithmetic>::Type;
  Factor acc[kOctet];

  FK_DEVICE void clear() {
#pragma unroll
    for (int i = 0; i < kOctet; ++i) acc[i] = 0;
  }
  FK_DEVICE void add(const fk_words &words, uint32_t octet, Factor q) {
    const uint32_t signs = octet_signs(words, octet);
#pragma unroll
    for (int i = 0; i < kOctet; ++i) acc[i] += signs & 1u << i ? -q : q;
  }
};

// Sums of the minus side (contract section 6.2). For Rademacher noise: -acc, except that a zero is the same on both
// sides.
template <typename Arithmetic> FK_DEVICE void negated_sums(Rademacher, Arithmetic (&minus)[kOctet],
                                                           const Arithmetic (&acc)[kOctet],
                                                           const TermArguments &, uint32_t, uint64_t) {
#pragma unroll
  for (int i = 0; i < kOctet; ++i) minus[i] = acc[i] == (Arithmetic)0 ? acc[i] : -acc[i];
}

// For Gaussian noise: -acc, except that zeros need not mirror. They are rare: an octet that has one is summed anew,
// from negated coefficients and without shared keys. octet: its index in the noise.
template <typename Arithmetic>
FK_DEVICE void negated_sums(Gaussian, Arithmetic (&minus)[kOctet], const Arithmetic (&acc)[kOctet],
                            const TermArguments &terms, uint32_t stream, uint64_t octet) {
  bool has_zero = false;
#pragma unroll
  for (int i = 0; i < kOctet; ++i) {
    minus[i] = -acc[i];
    has_zero |= acc[i] == (Arithmetic)0;
  }
  if (!has_zero) return;
#pragma unroll
  for (int i = 0; i < kOctet; ++i) minus[i] = (Arithmetic)-0.0;
#pragma unroll 1
  for (int64_t k = 0; k < terms.count; ++k) {
    bool skipped;
    const Arithmetic c = term_coefficient<Gaussian, Arithmetic>(terms, k, skipped);
    if (c == (Arithmetic)0) continue;
    add_gaussian(minus, fk_group_words(term_seed(terms, k), stream, octet, FK_TAG_GAUSSIAN), -c);
  }
}

// Writes one octet from its sums, on both sides where two are wanted. octet: its index in the noise.
template <typename Storage, typename Family>
FK_DEVICE void write_sums(const OctetMemory &memory, const typename Storage::Octet &weights,
                          typename Storage::Arithmetic alpha,
                          const typename Storage::Arithmetic (&acc)[kOctet], const RoundingBits &bits,
                          const TermArguments &terms, uint32_t stream, uint64_t octet) {
  write_side<Storage>(memory, memory.out, memory.out_stride, weights, alpha, acc, bits);
  if (memory.out_minus) {
    typename Storage::Arithmetic minus[kOctet];
    negated_sums(Family(), minus, acc, terms, stream, octet);
    write_side<Storage>(memory, memory.out_minus, memory.out_minus_stride, weights, alpha, minus, bits);
  }
}
