// The gate of the noise contract: only Philox, the Gaussian transform and one fma, in a loop over K seeds.
// benchmarks/machine_code/gate.py compiles it for a GPU and counts the instructions of the loop; the library has
// no part of it.
// The transform and all constants come from csrc/include. Philox is written out here because its round keys are
// prepared in shared memory, which saves three instructions for each normal.
#include "normal.h"
#include "philox4x32.h"

#ifndef FK_GROUPS_PER_THREAD
#define FK_GROUPS_PER_THREAD 4
#endif

namespace {

constexpr int kThreads = 256;
constexpr int kSeedsPerChunk = 64;
constexpr int kGroups = FK_GROUPS_PER_THREAD;
constexpr int kKeyVectors = FK_PHILOX_ROUNDS / 2; // uint4: two round keys each
constexpr int kGroupSize = 1 << FK_GAUSSIAN_GROUP_SHIFT;

struct alignas(16) SeedEntry {
  uint4 round_keys[kKeyVectors];
  float coefficient;
};

__device__ __forceinline__ void philox_round(uint32_t (&x)[4], uint32_t k0, uint32_t k1) {
  const uint64_t p0 = (uint64_t)FK_PHILOX_M0 * x[0];
  const uint64_t p1 = (uint64_t)FK_PHILOX_M1 * x[2];
  x[0] = (uint32_t)(p1 >> 32) ^ x[1] ^ k0;
  x[2] = (uint32_t)(p0 >> 32) ^ x[3] ^ k1;
  x[1] = (uint32_t)p1;
  x[3] = (uint32_t)p0;
}

__device__ __forceinline__ void load_seed(SeedEntry &entry, uint64_t seed, float coefficient) {
  const uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
  for (uint32_t i = 0; i < kKeyVectors; ++i) {
    entry.round_keys[i] = make_uint4(k0 + 2 * i * FK_PHILOX_W0, k1 + 2 * i * FK_PHILOX_W1,
                                     k0 + (2 * i + 1) * FK_PHILOX_W0, k1 + (2 * i + 1) * FK_PHILOX_W1);
  }
  entry.coefficient = coefficient;
}

} // namespace

// out: [gridDim.x * kThreads * kGroups * kGroupSize], 16-byte aligned; out = sum over k of coefficients[k] z_k.
// seeds, coefficients: [num_seeds], a multiple of kSeedsPerChunk.
extern "C" __global__ void __launch_bounds__(kThreads)
    fk_gate(float *__restrict__ out, const uint64_t *__restrict__ seeds,
            const float *__restrict__ coefficients, int num_seeds, uint32_t stream) {
  __shared__ SeedEntry chunk[kSeedsPerChunk];
  const uint32_t first_group = blockIdx.x * kThreads * kGroups + threadIdx.x;
  float acc[kGroups][kGroupSize];
  for (int g = 0; g < kGroups; ++g) {
    for (int i = 0; i < kGroupSize; ++i) acc[g][i] = -0.0f;
  }
  for (int first = 0; first < num_seeds; first += kSeedsPerChunk) {
    __syncthreads();
    if (threadIdx.x < kSeedsPerChunk) {
      load_seed(chunk[threadIdx.x], seeds[first + threadIdx.x], coefficients[first + threadIdx.x]);
    }
    __syncthreads();
#pragma unroll 1
    for (int k = 0; k < kSeedsPerChunk; ++k) { // the loop that is counted
      uint4 keys[kKeyVectors];
#pragma unroll
      for (int i = 0; i < kKeyVectors; ++i) keys[i] = chunk[k].round_keys[i];
      const float coefficient = chunk[k].coefficient;
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        uint32_t x[4] = {first_group + g * kThreads, stream, 0u, FK_TAG_GAUSSIAN};
#pragma unroll
        for (int i = 0; i < kKeyVectors; ++i) {
          philox_round(x, keys[i].x, keys[i].y);
          philox_round(x, keys[i].z, keys[i].w);
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const fk_normal_pair z = fk_normal_from_word(x[j]);
          acc[g][2 * j] = fk_fma(coefficient, z.even, acc[g][2 * j]);
          acc[g][2 * j + 1] = fk_fma(coefficient, z.odd, acc[g][2 * j + 1]);
        }
      }
    }
  }
  for (int g = 0; g < kGroups; ++g) {
    float4 *target = (float4 *)(out + (uint64_t)kGroupSize * (first_group + g * kThreads));
    target[0] = make_float4(acc[g][0], acc[g][1], acc[g][2], acc[g][3]);
    target[1] = make_float4(acc[g][4], acc[g][5], acc[g][6], acc[g][7]);
  }
}
