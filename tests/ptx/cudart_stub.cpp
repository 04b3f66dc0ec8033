// In the CUDA runtime's place: keeps the names of registered kernels and hands every launch to a callback.
#include <stddef.h>
#include <string.h>

#include <vector>

struct Dim {
  unsigned x, y, z;
};
struct Function {
  const void *host;
  const char *name;
};
// Returns 0 or an error.
using Launch = int (*)(const char *name, const unsigned *sizes, void **arguments, size_t shared);

namespace {

constexpr int kInvalidDevice = 101;
constexpr int kInvalidFunction = 98;
constexpr int kVersion = 13000;

// Filled by constructors of other sources, hence built at its first use.
std::vector<Function> &functions() {
  static std::vector<Function> found;
  return found;
}

const char *name_of(const void *host) {
  for (const Function &function : functions()) {
    if (function.host == host) return function.name;
  }
  return nullptr;
}

Launch callback;
int last_error;

} // namespace

extern "C" {

void ptx_set_callback(Launch launch) { callback = launch; }

void **__cudaRegisterFatBinary(void *) {
  static void *handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void **) {}
void __cudaUnregisterFatBinary(void **) {}
void __cudaRegisterFunction(void **, const char *host, char *, const char *name, int, void *, void *, void *,
                            void *, int *) {
  functions().push_back({host, strdup(name)});
}
int cudaLaunchKernel(const void *host, Dim grid, Dim block, void **arguments, size_t shared, void *) {
  const unsigned sizes[6] = {grid.x, grid.y, grid.z, block.x, block.y, block.z};
  const char *name = name_of(host);
  return last_error = name ? callback(name, sizes, arguments, shared) : kInvalidFunction;
}
// What the launch by <<<>>> calls, which nvcc makes for each kernel and the library does not use.
int __cudaGetKernel(void **, const void *) { return kInvalidFunction; }
int __cudaLaunchKernel(void *, Dim, Dim, void **, size_t, void *) { return kInvalidFunction; }
int __cudaPopCallConfiguration(Dim *, Dim *, size_t *, void *) { return kInvalidFunction; }

int cudaFuncGetAttributes(void *, const void *host) { return name_of(host) ? 0 : kInvalidFunction; }
int cudaGetDevice(int *device) { return *device = 0; }
int cudaSetDevice(int device) { return device ? kInvalidDevice : 0; }
int cudaGetLastError(void) {
  const int error = last_error;
  last_error = 0;
  return error;
}
int cudaDriverGetVersion(int *version) { return *version = kVersion, 0; }
int cudaRuntimeGetVersion(int *version) { return *version = kVersion, 0; }
int cudaThreadExchangeStreamCaptureMode(int *mode) { return *mode = 0; }
const char *cudaGetErrorString(int error) { return error ? "a fault on the emulated GPU" : "no error"; }
}
