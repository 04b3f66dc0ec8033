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

// Filled by constructors of other sources, hence built at its first use. Never freed: its items have addresses.
std::vector<Function *> &functions() {
  static std::vector<Function *> found;
  return found;
}

Launch callback;
int last_error;
Dim grid_, block_;
size_t shared_;
void *stream_;

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
  functions().push_back(new Function{host, strdup(name)});
}
int __cudaGetKernel(void **kernel, const void *host) {
  for (Function *function : functions()) {
    if (function->host != host) continue;
    *kernel = function;
    return 0;
  }
  return kInvalidFunction;
}
unsigned __cudaPushCallConfiguration(Dim grid, Dim block, size_t shared, void *stream) {
  grid_ = grid, block_ = block, shared_ = shared, stream_ = stream;
  return 0;
}
int __cudaPopCallConfiguration(Dim *grid, Dim *block, size_t *shared, void **stream) {
  *grid = grid_, *block = block_, *shared = shared_, *stream = stream_;
  return 0;
}
int __cudaLaunchKernel(void *kernel, Dim grid, Dim block, void **arguments, size_t shared, void *) {
  const unsigned sizes[6] = {grid.x, grid.y, grid.z, block.x, block.y, block.z};
  return last_error = callback(static_cast<Function *>(kernel)->name, sizes, arguments, shared);
}
int cudaFuncGetAttributes(void *, const void *host) {
  void *kernel;
  return __cudaGetKernel(&kernel, host);
}
int cudaGetDevice(int *device) { return *device = 0; }
int cudaSetDevice(int device) { return device ? kInvalidDevice : 0; }
int cudaGetLastError(void) {
  const int error = last_error;
  last_error = 0;
  return error;
}
int cudaDriverGetVersion(int *version) { return *version = 13000, 0; }
int cudaRuntimeGetVersion(int *version) { return *version = 13000, 0; }
int cudaThreadExchangeStreamCaptureMode(int *mode) { return *mode = 0; }
const char *cudaGetErrorString(int error) { return error ? "a fault on the emulated GPU" : "no error"; }
}
