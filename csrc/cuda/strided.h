// The kernel for strided tensors, which are all that are not flat: slices, transposed memory, gathered rows. Such a
// tensor is a number of runs, each of elements that are consecutive in the noise and evenly spaced in memory. A thread
// computes one slot: the part of a run in one octet of noise. This serves every tensor; where runs are long, the
// arithmetic of indices is done once for eight elements.
#pragma once

#include "octet.h"

constexpr int kStridedThreads = 256;
constexpr int kStridedChunk = 64;

template <typename Family, typename Arithmetic> struct StridedShared {
  uint64_t seeds[kStridedChunk];
  typename OctetSums<Family, Arithmetic>::Factor factors[kStridedChunk];
  TermSurvey<Arithmetic> survey; // for Rademacher noise
  int32_t tensor;
  uint32_t any_term;
};

// The factor of term k in the sums (OctetSums): the coefficient for Gaussian noise.
template <typename Arithmetic> FK_DEVICE Arithmetic term_factor(Gaussian, const TermArguments &terms,
                                                                int64_t k, const TermSurvey<Arithmetic> &) {
  return counted_coefficient<Gaussian, Arithmetic>(terms, k);
}

template <typename Arithmetic> FK_DEVICE typename Integers<Arithmetic>::Type
term_factor(Rademacher, const TermArguments &terms, int64_t k, const TermSurvey<Arithmetic> &survey) {
  bool skipped;
  return scaled_coefficient(term_coefficient<Rademacher, Arithmetic>(terms, k, skipped), scale_of(survey));
}

// Prepares the sums by a first look at all terms, which Gaussian noise does not need.
template <typename Arithmetic>
FK_DEVICE void look_at_terms(Gaussian, const TermArguments &, StridedShared<Gaussian, Arithmetic> &) {}

template <typename Arithmetic> FK_DEVICE void look_at_terms(Rademacher, const TermArguments &terms,
                                                            StridedShared<Rademacher, Arithmetic> &shared) {
  survey_terms<kStridedThreads>(terms, shared.survey);
  __syncthreads();
  if (threadIdx.x == 0) shared.any_term = shared.survey.num_terms;
  __syncthreads(); // without terms no other barrier comes before any_term is read
}

// The finished sums, as numbers.
template <typename Arithmetic> FK_DEVICE void finish_sums(Arithmetic (&acc)[kOctet],
                                                          const OctetSums<Gaussian, Arithmetic> &sums,
                                                          const StridedShared<Gaussian, Arithmetic> &) {
#pragma unroll
  for (int e = 0; e < kOctet; ++e) acc[e] = sums.acc[e];
}

template <typename Arithmetic>
FK_DEVICE void finish_sums(Arithmetic (&acc)[kOctet], const OctetSums<Rademacher, Arithmetic> &sums,
                           const StridedShared<Rademacher, Arithmetic> &shared) {
  const TermScale<Arithmetic> scale = scale_of(shared.survey);
#pragma unroll
  for (int e = 0; e < kOctet; ++e) {
    acc[e] = shared.survey.num_terms ? unscaled_sum(sums.acc[e], scale) : (Arithmetic)-0.0;
  }
}

struct Slot {
  OctetMemory memory;
  uint64_t octet;
  bool no_source; // the index of its gathered row is out of range
};

template <typename Storage> FK_DEVICE Slot find_slot(const StridedTensor &strided, const int64_t *rows,
                                                     int64_t num_source_rows, int64_t slot) {
  constexpr int64_t kSize = sizeof(typename Storage::Element);
  const fk_tensor &tensor = strided.tensor;
  const int64_t run = slot / strided.slots_per_run;
  int64_t rest = run, element = tensor.first_element, in_at = 0, out_at = 0, minus_at = 0;
  Slot found;
  found.no_source = false;
  for (int d = strided.first_dim - 1; d >= 0; --d) {
    const int64_t i = rest % tensor.sizes[d];
    rest /= tensor.sizes[d];
    int64_t x = i;
    if (rows && d == 0) {
      x = rows[i];
      found.no_source = x < 0 || x >= num_source_rows;
    }
    element += x * tensor.element_strides[d];
    in_at += x * tensor.in_strides[d];
    out_at += i * tensor.out_strides[d];
    minus_at += i * tensor.out_minus_strides[d];
  }
  if (found.no_source) element = 0;
  const int64_t place = element & (kOctet - 1); // of the element within its octet
  // Where the octet begins, counted in elements from the first of the run.
  const int64_t at = (slot - run * strided.slots_per_run) * kOctet - place;
  found.octet = (uint64_t)(element + at) >> kOctetShift;
  OctetMemory &memory = found.memory;
  const bool has_run = strided.first_dim < tensor.ndim;
  memory.in_stride = has_run ? tensor.in_strides[strided.first_dim] : 1;
  memory.out_stride = has_run ? tensor.out_strides[strided.first_dim] : 1;
  memory.out_minus_stride = has_run ? tensor.out_minus_strides[strided.first_dim] : 1;
  memory.in =
      tensor.in && !found.no_source ? (const char *)tensor.in + (in_at + at * memory.in_stride) * kSize : 0;
  const int64_t residual_at = (in_at + at * memory.in_stride) * (int64_t)sizeof(int16_t);
  memory.residual = tensor.residual && !found.no_source ? (const char *)tensor.residual + residual_at : 0;
  memory.residual_out = tensor.residual_out ? (char *)tensor.residual_out + residual_at : 0;
  memory.out = (char *)tensor.out + (out_at + at * memory.out_stride) * kSize;
  memory.out_minus =
      tensor.out_minus ? (char *)tensor.out_minus + (minus_at + at * memory.out_minus_stride) * kSize : 0;
  memory.begin = at < 0 ? (int32_t)-at : 0;
  const int64_t remaining = strided.run_length - at;
  memory.end = remaining < kOctet ? (remaining < 0 ? 0 : (int32_t)remaining) : kOctet;
  const bool contiguous =
      memory.in_stride == 1 && memory.out_stride == 1 && (!memory.out_minus || memory.out_minus_stride == 1);
  const uint64_t addresses =
      (uint64_t)memory.in | (uint64_t)memory.out | (uint64_t)memory.out_minus | (uint64_t)memory.residual;
  memory.whole = contiguous && (addresses & 15u) == 0 && memory.begin == 0 && memory.end == kOctet;
  return found;
}

template <typename Storage, typename Family> __global__ void __launch_bounds__(kStridedThreads, 2)
    strided(const __grid_constant__ StridedLaunch launch) {
  using Arithmetic = typename Storage::Arithmetic;
  using Factor = typename OctetSums<Family, Arithmetic>::Factor;
  __shared__ StridedShared<Family, Arithmetic> shared;
  const TermArguments &terms = launch.terms;
  if (threadIdx.x == 0) {
    shared.any_term = 0;
    shared.survey = {};
    const StridedTensor &tensor = tensor_of_tile(launch.tensors, launch.num_tensors, blockIdx.x);
    shared.tensor = (int32_t)(&tensor - launch.tensors);
  }
  __syncthreads();
  const StridedTensor &tensor = launch.tensors[shared.tensor];
  const int64_t slot = (int64_t)(blockIdx.x - tensor.first_tile) * kStridedThreads + threadIdx.x;
  const bool inside = slot < tensor.num_slots;
  const Slot found =
      find_slot<Storage>(tensor, launch.rows, launch.num_source_rows, inside ? slot : tensor.num_slots - 1);
  const OctetMemory &memory = found.memory;
  const bool busy = inside && memory.begin < memory.end;
  OctetSums<Family, Arithmetic> sums;
  sums.clear();
  look_at_terms(Family(), terms, shared);
  for (int64_t first = 0; first < terms.count; first += kStridedChunk) {
    const int num_terms = terms.count - first < kStridedChunk ? (int)(terms.count - first) : kStridedChunk;
    __syncthreads();
    if ((int)threadIdx.x < num_terms) {
      const Factor factor = term_factor(Family(), terms, first + threadIdx.x, shared.survey);
      shared.seeds[threadIdx.x] = term_seed(terms, first + threadIdx.x);
      shared.factors[threadIdx.x] = factor;
      if (factor != (Factor)0) atomicOr(&shared.any_term, 1u);
    }
    __syncthreads();
    if (!busy) continue;
#pragma unroll 1
    for (int k = 0; k < num_terms; ++k) {
      const Factor factor = shared.factors[k];
      if (factor == (Factor)0) continue;
      const fk_words words = fk_group_words(shared.seeds[k], tensor.tensor.stream,
                                            found.octet >> (Family::kGroupShift - kOctetShift), Family::kTag);
      sums.add(words, (uint32_t)found.octet, factor);
    }
  }
  if (!busy) return;
  Arithmetic acc[kOctet];
  finish_sums(acc, sums, shared);
  if (found.no_source) { // NaN sums make NaN results
#pragma unroll
    for (int e = 0; e < kOctet; ++e) acc[e] = (Arithmetic)fk_float_from_bits(0x7FC00000u);
  }
  const Arithmetic alpha = memory.in ? term_alpha<Arithmetic>(terms) : (Arithmetic)1;
  const typename Storage::Octet weights = read_octet<Storage>(memory);
  if (memory.in && !shared.any_term && alpha == (Arithmetic)1) {
    copy_octet<Storage>(memory, weights);
    return;
  }
  RoundingBits bits;
  bits.stochastic = Storage::kRounds && terms.stochastic;
  if (bits.stochastic) {
    bits.words = fk_group_words(term_rounding_seed(terms), tensor.tensor.stream,
                                found.octet >> (FK_ROUNDING_GROUP_SHIFT - kOctetShift), FK_TAG_ROUNDING);
  }
  write_sums<Storage, Family>(memory, weights, alpha, acc, bits, terms, tensor.tensor.stream, found.octet);
}
