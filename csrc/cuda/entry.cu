// The exported functions, and the kernels that only tests call.
#include "noise.h"
#include "plan.h"

#define FK_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

constexpr int kTestThreads = 256;

// Makes a device the current one for as long as the guard lives, and the caller's device afterwards. Since CUDA 12
// cudaSetDevice creates a context where there is none, some 0.5 GB: nothing is set that need not be. A caller on
// another device than the current one, which may never have been used, does better to set it first.
class DeviceGuard {
public:
  explicit DeviceGuard(int32_t device) : before_(device), device_(device), error_(cudaGetDevice(&before_)) {
    if (error_ == cudaSuccess && before_ != device_) error_ = cudaSetDevice(device_);
  }
  ~DeviceGuard() {
    if (error_ == cudaSuccess && before_ != device_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard &) = delete;
  DeviceGuard &operator=(const DeviceGuard &) = delete;
  cudaError_t error() const { return error_; }

private:
  int before_, device_;
  cudaError_t error_;
};

struct WordsTest {
  const uint32_t *counters, *keys;
  uint32_t *out;
  int64_t count;
};

struct NormalsTest {
  const uint32_t *words;
  float *out;
  int64_t count;
};

struct DigestTest {
  uint64_t first, count;
  uint64_t *digest;
};

FK_DEVICE int64_t thread_index() { return (int64_t)blockIdx.x * kTestThreads + threadIdx.x; }

__global__ void philox_words(const WordsTest test) {
  const int64_t i = thread_index();
  if (i >= test.count) return;
  const uint32_t *c = test.counters + 4 * i, *k = test.keys + 2 * i;
  const fk_words words = fk_philox4x32_10(c[0], c[1], c[2], c[3], k[0], k[1]);
  for (int j = 0; j < 4; ++j) test.out[4 * i + j] = words.w[j];
}

__global__ void normal_from_words(const NormalsTest test) {
  const int64_t i = thread_index();
  if (i >= test.count) return;
  const fk_normal_pair z = fk_normal_from_word(test.words[i]);
  test.out[2 * i] = z.even;
  test.out[2 * i + 1] = z.odd;
}

// Each thread takes every num_threads-th word; a sum of unsigned integers does not depend on the order.
__global__ void normal_digest(const DigestTest test) {
  const uint64_t num_threads = (uint64_t)gridDim.x * kTestThreads;
  uint64_t sum = 0;
  for (uint64_t i = (uint64_t)thread_index(); i < test.count; i += num_threads) {
    const uint32_t word = (uint32_t)(test.first + i);
    const fk_normal_pair z = fk_normal_from_word(word);
    const uint64_t even = fk_bits_from_float(z.even), odd = fk_bits_from_float(z.odd);
    sum += (even + (odd << 32)) * (2 * (uint64_t)word + 1);
  }
  atomicAdd((unsigned long long *)test.digest, (unsigned long long)sum);
}

uint32_t num_blocks(int64_t count) { return (uint32_t)((count + kTestThreads - 1) / kTestThreads); }

template <typename Test> int32_t run_test(void (*kernel)(const Test), uint32_t blocks, const Test &test,
                                          int32_t device, void *cuda_stream) {
  const DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return (int32_t)guard.error();
  if (blocks) FK_LAUNCH(kernel, blocks, kTestThreads, cuda_stream, test);
  return (int32_t)cudaGetLastError();
}

bool known_codes(const fk_tensor *tensors, int64_t num_tensors, const fk_cuda_terms &terms) {
  if (terms.family != FK_GAUSSIAN && terms.family != FK_RADEMACHER) return false;
  if (terms.rounding != FK_NEAREST && terms.rounding != FK_STOCHASTIC) return false;
  const bool by_value = !terms.seeds_on_device || !terms.coeffs_on_device;
  if (terms.count < 0 || (by_value && terms.count > FK_CUDA_MAX_TERMS_BY_VALUE)) return false;
  for (int64_t i = 0; i < num_tensors; ++i) {
    if (tensors[i].dtype < FK_FP32 || tensors[i].dtype > FK_FP64) return false;
    if (tensors[i].out_dtype != tensors[i].dtype) return false; // wide outputs: the caller widens first
    if (tensors[i].ndim < 0 || tensors[i].ndim > FK_MAX_DIMS) return false;
  }
  return true;
}

} // namespace

FK_EXPORT int32_t fk_abi_version(void) { return FK_ABI_VERSION; }

FK_EXPORT int32_t fk_contract_version(void) { return FK_CONTRACT_VERSION; }

FK_EXPORT int32_t fk_cuda_driver_version(int32_t *version) { return (int32_t)cudaDriverGetVersion(version); }

FK_EXPORT int32_t fk_cuda_runtime_version(int32_t *version) {
  return (int32_t)cudaRuntimeGetVersion(version);
}

FK_EXPORT const char *fk_cuda_error_string(int32_t error) { return cudaGetErrorString((cudaError_t)error); }

// Loading kernels is no work in a CUDA stream, so this thread may load them while it captures a graph: hence the
// relaxed capture mode.
FK_EXPORT int32_t fk_cuda_load(int32_t device) {
  const DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return (int32_t)guard.error();
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  cudaError_t error = cudaThreadExchangeStreamCaptureMode(&mode); // mode now holds the previous one
  if (error != cudaSuccess) return (int32_t)error;
  const int32_t loaded = fk_cuda_load_kernels();
  error = cudaThreadExchangeStreamCaptureMode(&mode);
  return loaded ? loaded : (int32_t)error;
}

FK_EXPORT int32_t fk_cuda_seed_axpy(const fk_tensor *tensors, int64_t num_tensors, const int64_t *rows,
                                    int64_t num_source_rows, const fk_cuda_terms *terms, int32_t device,
                                    void *cuda_stream) {
  if (!known_codes(tensors, num_tensors, *terms)) return FK_ERROR_ARGUMENT;
  const DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return (int32_t)guard.error();
  return fk_cuda_run(tensors, num_tensors, rows, num_source_rows, terms, cuda_stream);
}

FK_EXPORT int32_t fk_cuda_philox_words(const uint32_t *counters, const uint32_t *keys, uint32_t *out,
                                       int64_t count, int32_t device, void *cuda_stream) {
  return run_test(philox_words, num_blocks(count), WordsTest{counters, keys, out, count}, device,
                  cuda_stream);
}

FK_EXPORT int32_t fk_cuda_normal_from_words(const uint32_t *words, float *out, int64_t count, int32_t device,
                                            void *cuda_stream) {
  return run_test(normal_from_words, num_blocks(count), NormalsTest{words, out, count}, device, cuda_stream);
}

FK_EXPORT int32_t fk_cuda_normal_digest(uint64_t first, uint64_t count, uint64_t *digest, int32_t device,
                                        void *cuda_stream) {
  const uint32_t blocks = count < (1u << 20) ? num_blocks((int64_t)count) : 4096u;
  return run_test(normal_digest, blocks, DigestTest{first, count, digest}, device, cuda_stream);
}
