// The threads of a block are fibers, each on a stack of its own. A turn runs every thread to its next barrier or its
// end, in ascending or descending order. A kernel that relies on more than its barriers gives different results in the
// two orders.
#include "cuda_shim.h"

#include <stdio.h>
#include <stdlib.h>
#include <ucontext.h>

#include <vector>

fk_shim_index threadIdx, blockIdx, gridDim;

namespace {

constexpr size_t kStackBytes = 1 << 17;

struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  bool done;
};

std::vector<Fiber> fibers;
ucontext_t scheduler;
unsigned current;
const std::function<void()> *running;
bool descending;
uint64_t num_launches;
unsigned first_block, end_block = ~0u; // the blocks of a launch that are run
cudaError_t last_error = cudaSuccess, load_status = cudaSuccess;
int current_device;
std::vector<int> devices_set;

void run_fiber() {
  (*running)();
  fibers[current].done = true;
  swapcontext(&fibers[current].context, &scheduler);
}

void start(unsigned thread) {
  Fiber &fiber = fibers[thread];
  fiber.done = false;
  fiber.stack.resize(kStackBytes);
  if (getcontext(&fiber.context)) abort();
  fiber.context.uc_stack.ss_sp = fiber.stack.data();
  fiber.context.uc_stack.ss_size = kStackBytes;
  fiber.context.uc_link = 0;
  makecontext(&fiber.context, run_fiber, 0);
}

// Runs a block; returns false if some of its threads ended while others wait at a barrier.
bool run_block(unsigned threads) {
  for (unsigned t = 0; t < threads; ++t) start(t);
  for (unsigned num_done = 0; num_done == 0;) {
    for (unsigned i = 0; i < threads; ++i) {
      current = descending ? threads - 1 - i : i;
      threadIdx.x = current;
      if (swapcontext(&scheduler, &fibers[current].context)) abort();
      num_done += fibers[current].done;
    }
    if (num_done && num_done != threads) return false;
  }
  return true;
}

} // namespace

void __syncthreads() { swapcontext(&fibers[current].context, &scheduler); }

namespace {

// Values that the threads of a block exchange, in two buffers by turns: a thread may fill the next one while others
// still read.
constexpr unsigned kMaxThreads = 1024, kWarp = 32;
struct Handed {
  uint32_t rows[4], columns[2];
};
Handed handed[2][kMaxThreads];
unsigned num_handed[kMaxThreads];

// Hands over a thread's values, and waits for those of the block: returns the buffer that holds them all.
const Handed *hand_over(const Handed &own) {
  Handed *buffer = handed[num_handed[current]++ % 2];
  buffer[current] = own;
  __syncthreads();
  return buffer;
}

int32_t byte_of(uint32_t word, int i) { return (int32_t)(word >> 8 * i & 0xFF); }

} // namespace

void fk_shim_multiply_accumulate(int32_t (&sums)[4], const uint32_t (&rows)[4],
                                 const uint32_t (&columns)[2]) {
  Handed own;
  for (int i = 0; i < 4; ++i) own.rows[i] = rows[i];
  for (int i = 0; i < 2; ++i) own.columns[i] = columns[i];
  const unsigned thread = current;
  const Handed *warp = hand_over(own) + thread / kWarp * kWarp;
  const unsigned g = thread % kWarp / 4, t = thread % 4;
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned row = g + i / 2 * 8, column = 2 * t + i % 2;
    uint32_t sum = (uint32_t)sums[i];
    for (unsigned term = 0; term < 32; ++term) {
      const unsigned half = term / 16, place = term % 16 / 4, byte = term % 4;
      const int32_t a = byte_of(warp[row % 8 * 4 + place].rows[half * 2 + row / 8], (int)byte);
      const int32_t b = (int8_t)byte_of(warp[column * 4 + place].columns[half], (int)byte);
      sum += (uint32_t)(a * b);
    }
    sums[i] = (int32_t)sum;
  }
}

uint32_t fk_shim_exchange(uint32_t value, unsigned bit) {
  Handed own = {};
  own.rows[0] = value;
  const unsigned thread = current;
  return hand_over(own)[thread ^ bit].rows[0];
}

void fk_shim_run(unsigned blocks, unsigned threads, const std::function<void()> &body) {
  if (fibers.size() < threads) fibers.resize(threads);
  running = &body;
  gridDim.x = blocks;
  ++num_launches;
  for (unsigned block = first_block; block < blocks && block < end_block; ++block) {
    blockIdx.x = block;
    if (!run_block(threads)) last_error = cudaErrorLaunchFailure;
  }
}

cudaError_t cudaGetDevice(int *device) {
  *device = current_device;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
  current_device = device;
  devices_set.push_back(device);
  return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes *, const void *) {
  if (load_status != cudaSuccess) last_error = load_status;
  return load_status;
}

cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}

const char *cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "some threads of a block wait at a barrier that others left out";
}

extern "C" void fk_shim_load_status(int32_t status) { load_status = (cudaError_t)status; }
extern "C" void fk_shim_descending(int32_t on) { descending = on != 0; }
// What was set since the last time, in `devices`, which has place for `most`; returns how many there were.
extern "C" int32_t fk_shim_devices_set(int32_t *devices, int32_t most) {
  int32_t count = 0;
  for (int device : devices_set) {
    if (count < most) devices[count] = device;
    ++count;
  }
  devices_set.clear();
  return count;
}
extern "C" uint64_t fk_shim_num_launches(void) { return num_launches; }
extern "C" void fk_shim_only_blocks(uint32_t first, uint32_t end) {
  first_block = first;
  end_block = end;
}
