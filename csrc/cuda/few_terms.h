// The kernel for one or two terms, whose speed memory limits, or nearly so. Round keys stay in registers. Weights are
// read before the noise is made, so that computing hides the wait for memory.
#pragma once

#include "flat.h"

// The sums of two terms of Rademacher noise: where both signs are +, and where the first is + and the second is -.
struct TwoTermSums {
  float equal, unequal;
};

template <int kTerms> struct FewShared {
  FlatTile tile;
  FoldedKeys keys[kTerms];
  FoldedKeys rounding;
  TwoTermSums sums; // for two terms of Rademacher noise
};

FK_DEVICE TwoTermSums sum_two_terms(float first, float second) {
  TermSurvey<float> survey;
  const uint32_t a = magnitude_bits(first), b = magnitude_bits(second);
  survey.largest = a > b ? a : b;
  survey.num_terms = (a != 0) + (b != 0);
  const TermScale<float> scale = scale_of(survey);
  const int32_t p = scaled_coefficient(first, scale), q = scaled_coefficient(second, scale);
  return {unscaled_sum(p + q, scale), unscaled_sum(p - q, scale)};
}

// Fills shared, by the first thread of each warp: warp 0 finds the tile, each of warps 1 .. kTerms prepares a term, and
// the next one prepares the rounding.
template <typename Storage, typename Family, int kTerms>
FK_DEVICE void prepare_few(const FlatLaunch &launch, FewShared<kTerms> &shared) {
  constexpr unsigned kWarp = 32;
  const unsigned role = threadIdx.x / kWarp;
  if (threadIdx.x % kWarp || role > kTerms + 1) return;
  const FlatTile tile = find_tile<Storage>(launch, kFewTile);
  if (role == 0) {
    shared.tile = tile;
  } else if (role <= kTerms) {
    FoldedKeys &keys = shared.keys[role - 1];
    const uint64_t seed = term_seed(launch.terms, role - 1);
    fold_keys(keys, seed, tile.stream, group_high(tile.first_element, Family::kGroupShift), Family::kTag);
    const float own = counted_coefficient<Family, float>(launch.terms, role - 1);
    keys.w[19] = fk_bits_from_float(own);
    if (Family::kTag == FK_TAG_RADEMACHER && kTerms == 2 && role == 1) {
      bool skipped;
      shared.sums = sum_two_terms(own, term_coefficient<Family, float>(launch.terms, 1, skipped));
    }
  } else if (launch.terms.stochastic) {
    fold_keys(shared.rounding, term_rounding_seed(launch.terms), tile.stream,
              group_high(tile.first_element, FK_ROUNDING_GROUP_SHIFT), FK_TAG_ROUNDING);
  }
}

// The keys and coefficients of all terms, in registers.
template <int kTerms> struct FewTerms {
  FoldedKeys keys[kTerms];
  TwoTermSums sums;
  FK_DEVICE float coefficient(int k) const { return fk_float_from_bits(keys[k].w[19]); }
};

template <typename Family> FK_DEVICE uint64_t octet_product(uint32_t first_group, uint32_t octet) {
  return low_product(first_group + (octet >> (Family::kGroupShift - kOctetShift)));
}

// value, negated if bit e of signs is set.
FK_DEVICE float with_sign(float value, uint32_t signs, int e) {
  return fk_float_from_bits(fk_bits_from_float(value) ^ (signs << (31 - e) & 0x80000000u));
}

// The sums of one octet. product: low_product of its group. kAllTerms: all terms count.
template <bool kAllTerms, int kTerms> FK_DEVICE void
sum_terms(Gaussian, float (&acc)[kOctet], uint64_t product, uint32_t, const FewTerms<kTerms> &terms) {
#pragma unroll
  for (int e = 0; e < kOctet; ++e) acc[e] = -0.0f;
#pragma unroll
  for (int k = 0; k < kTerms; ++k) {
    if (kAllTerms || terms.coefficient(k) != 0.0f) {
      add_gaussian(acc, folded_philox(product, terms.keys[k]), terms.coefficient(k));
    }
  }
}

template <bool kAllTerms> FK_DEVICE void sum_terms(Rademacher, float (&acc)[kOctet], uint64_t product,
                                                   uint32_t octet, const FewTerms<1> &terms) {
  if (!kAllTerms && terms.coefficient(0) == 0.0f) {
#pragma unroll
    for (int e = 0; e < kOctet; ++e) acc[e] = -0.0f;
    return;
  }
  const uint32_t signs = octet_signs(folded_philox(product, terms.keys[0]), octet);
#pragma unroll
  for (int e = 0; e < kOctet; ++e) acc[e] = with_sign(terms.coefficient(0), signs, e);
}

template <bool kAllTerms> FK_DEVICE void sum_terms(Rademacher, float (&acc)[kOctet], uint64_t product,
                                                   uint32_t octet, const FewTerms<2> &terms) {
  if (!kAllTerms && terms.coefficient(0) == 0.0f && terms.coefficient(1) == 0.0f) {
#pragma unroll
    for (int e = 0; e < kOctet; ++e) acc[e] = -0.0f;
    return;
  }
  const uint32_t first = octet_signs(folded_philox(product, terms.keys[0]), octet);
  const uint32_t unequal = first ^ octet_signs(folded_philox(product, terms.keys[1]), octet);
  // A sum that is 0 is +0 whatever the signs.
  uint32_t signs = first;
  if (terms.sums.equal == 0.0f) signs &= unequal;
  if (terms.sums.unequal == 0.0f) signs &= ~unequal;
#pragma unroll
  for (int e = 0; e < kOctet; ++e) {
    acc[e] = with_sign(unequal & 1u << e ? terms.sums.unequal : terms.sums.equal, signs, e);
  }
}

// Blocks that a multiprocessor runs at once: as many as registers allow without spills.
template <typename Family, int kTerms> constexpr int few_blocks() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
  return 2;
#else
  return kTerms == 1 && Family::kTag == FK_TAG_GAUSSIAN ? 3 : 2;
#endif
}

// kCompensated: the weights have residuals, and the short way updates them in place. It is instantiated for one term
// only; two terms with residuals take the long way. One term without kCompensated serves weights without residuals.
template <typename Storage, typename Family, int kTerms, bool kCompensated>
__global__ void __launch_bounds__(kThreads, few_blocks<Family, kTerms>())
    few_terms(const __grid_constant__ FlatLaunch launch) {
  __shared__ FewShared<kTerms> shared;
  prepare_few<Storage, Family, kTerms>(launch, shared);
  __syncthreads();
  const FlatTile &tile = shared.tile;
  FewTerms<kTerms> terms;
  terms.sums = shared.sums;
  bool any_term = false, all_terms = true;
#pragma unroll
  for (int k = 0; k < kTerms; ++k) {
    terms.keys[k] = load_keys(shared.keys[k]);
    any_term |= terms.coefficient(k) != 0.0f;
    all_terms &= terms.coefficient(k) != 0.0f;
  }
  const float alpha = tile.memory.in ? term_alpha<float>(launch.terms) : 1.0f;
  const bool stochastic = Storage::kRounds && launch.terms.stochastic;
  const uint32_t first_group = group_low(tile.first_element, Family::kGroupShift);

  // The short way, for whole octets that are updated on one side and rounded to nearest, if all terms count: in each
  // step a thread computes kFewOctets octets.
  constexpr int32_t kStep = kOctet * kThreads * kFewOctets; // elements
  const bool plain = tile.memory.whole && tile.memory.in && !tile.memory.out_minus && all_terms &&
                     !stochastic &&
                     (kCompensated ? tile.memory.residual_out != 0 : tile.memory.residual == 0);
  const int32_t whole_first = plain ? (tile.memory.begin + kStep - 1) / kStep : 0;
  const int32_t whole_last = plain ? tile.memory.end / kStep : 0;
  constexpr int32_t kStepBytes = kStep * (int32_t)sizeof(typename Storage::Element);
  const int64_t thread_bytes = (int64_t)(threadIdx.x * kOctet * sizeof(typename Storage::Element));
  const char *in = tile.memory.in + whole_first * (int64_t)kStepBytes + thread_bytes;
  char *out = tile.memory.out + whole_first * (int64_t)kStepBytes + thread_bytes;
  char *residual = tile.memory.residual_out + whole_first * (int64_t)kStepBytes + thread_bytes;
#pragma unroll 1
  for (int32_t step = whole_first; step < whole_last;
       ++step, in += kStepBytes, out += kStepBytes, residual += kStepBytes) {
    typename Storage::Octet weights[kFewOctets], residuals[kFewOctets];
#pragma unroll
    for (int p = 0; p < kFewOctets; ++p) {
      weights[p] = read_whole<Storage>(in + p * (kStepBytes / kFewOctets));
      if (kCompensated) residuals[p] = read_whole<Storage>(residual + p * (kStepBytes / kFewOctets));
    }
#pragma unroll
    for (int p = 0; p < kFewOctets; ++p) {
      const uint32_t octet = (uint32_t)(step * kFewOctets + p) * kThreads + threadIdx.x;
      float acc[kOctet];
      sum_terms<true>(Family(), acc, octet_product<Family>(first_group, octet), octet, terms);
      if constexpr (kCompensated) {
        add_values<Storage>(acc, alpha, weights[p], residuals[p]);
        Storage::split(acc, weights[p], residuals[p]);
        write_whole<Storage>(residual + p * (kStepBytes / kFewOctets), residuals[p]);
      } else {
        add_weights<Storage>(acc, alpha, weights[p]);
        Storage::round_nearest(acc, weights[p]);
      }
      write_whole<Storage>(out + p * (kStepBytes / kFewOctets), weights[p]);
    }
  }

  // Dropping the residual pointers saves registers.
  constexpr bool kHasResiduals = kCompensated || kTerms != 1;
  // The long way, for everything else in the tile: in each pass a thread computes one octet. A step above covers
  // kFewOctets passes.
  constexpr int32_t kPass = kOctet * kThreads; // elements
  const bool unchanged = tile.memory.in && !any_term && alpha == 1.0f;
  const int32_t end_pass = (tile.memory.end + kPass - 1) / kPass;
#pragma unroll 1
  for (int32_t pass = tile.memory.begin / kPass; pass < end_pass; ++pass) {
    if (pass >= whole_first * kFewOctets && pass < whole_last * kFewOctets) continue;
    const uint32_t octet = (uint32_t)pass * kThreads + threadIdx.x;
    OctetMemory memory = octet_memory<Storage>(tile, (int32_t)octet);
    if (!kHasResiduals) memory.residual = memory.residual_out = 0;
    const typename Storage::Octet weights = read_octet<Storage>(memory);
    if (unchanged) {
      copy_octet<Storage>(memory, weights);
      continue;
    }
    float acc[kOctet];
    sum_terms<false>(Family(), acc, octet_product<Family>(first_group, octet), octet, terms);
    const uint64_t noise_octet = (tile.first_element >> kOctetShift) + octet;
    RoundingBits bits;
    bits.stochastic = stochastic;
    if (stochastic)
      bits.words = folded_philox(low_product((uint32_t)noise_octet), load_keys(shared.rounding));
    write_sums<Storage, Family>(memory, weights, alpha, acc, bits, launch.terms, tile.stream, noise_octet);
  }
}
