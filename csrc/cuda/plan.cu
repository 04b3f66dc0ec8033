#include "plan.h"

#include "integer_sums.h"
#include "kernels.h"
#include "noise.h"

namespace {

constexpr int64_t kMaxTiles = 0x7FFFFFFF; // blocks of a grid
// With more terms than this the 32-bit sums of many_rademacher could overflow. The kernel for strided tensors, which
// has no such limit, then serves flat ones too.
constexpr int64_t kMaxProductTerms = 1 << 16;

const Kernels &kernels_of(int32_t dtype) {
  switch (dtype) {
  case FK_BF16:
    return kBf16Kernels;
  case FK_FP16:
    return kFp16Kernels;
  case FK_FP64:
    return kFp64Kernels;
  default:
    return kFp32Kernels;
  }
}

// The terms of a launch. Where all are known here only those that count are kept, in the arithmetic of the dtype;
// otherwise the kernels themselves skip the rest.
TermArguments make_terms(const fk_cuda_terms &terms, bool fp64) {
  TermArguments made = {};
  made.device_alpha = terms.device_alpha;
  made.alpha = terms.alpha;
  made.device_rounding_seed = terms.device_rounding_seed;
  made.rounding_seed = terms.rounding_seed;
  made.stochastic = terms.rounding == FK_STOCHASTIC;
  if (terms.seeds_on_device) made.seeds = terms.seeds;
  if (terms.coeffs_on_device) made.coeffs = terms.coeffs;
  if (made.seeds || made.coeffs) {
    for (int64_t k = 0; k < terms.count && !made.seeds; ++k) made.seeds_by_value[k] = terms.seeds[k];
    for (int64_t k = 0; k < terms.count && !made.coeffs; ++k) made.coeffs_by_value[k] = terms.coeffs[k];
    made.count = terms.count;
    return made;
  }
  for (int64_t k = 0; k < terms.count; ++k) {
    const double c = terms.coeffs[k];
    const bool counts = terms.family == FK_GAUSSIAN ? (fp64 ? c != 0.0 : (float)c != 0.0f)
                        : fp64                      ? fk_sum_counts64(c)
                                                    : fk_sum_counts((float)c);
    if (!counts) continue;
    made.seeds_by_value[made.count] = terms.seeds[k];
    made.coeffs_by_value[made.count] = terms.coeffs[k];
    ++made.count;
  }
  return made;
}

// A launch that is being filled.
template <typename Launch> struct Table {
  Launch launch;
  int64_t num_tiles;
  void (*run)(const Launch &launch, uint32_t num_tiles, void *cuda_stream);
};

// The launches of one dtype.
struct Plan {
  Table<FlatLaunch> flat;
  Table<StridedLaunch> strided;
  int64_t flat_tile, strided_tile;
  bool never_flat;
  int32_t *num_skipped; // given to the first launch, then NULL
  void *cuda_stream;
};

template <typename Launch> void flush(Plan &plan, Table<Launch> &table) {
  if (table.num_tiles > 0) {
    table.launch.terms.num_skipped = plan.num_skipped;
    plan.num_skipped = 0;
    table.run(table.launch, (uint32_t)table.num_tiles, plan.cuda_stream);
  }
  table.launch.num_tensors = 0;
  table.num_tiles = 0;
}

// Appends a tensor to a table; if it does not fit, launches the table first.
template <typename Launch, typename Tensor, int32_t kMaxTensors>
int32_t append(Plan &plan, Table<Launch> &table, Tensor &tensor, int64_t num_tiles) {
  if (num_tiles > kMaxTiles) return FK_ERROR_ARGUMENT;
  if (table.launch.num_tensors == kMaxTensors || table.num_tiles + num_tiles > kMaxTiles) flush(plan, table);
  tensor.first_tile = (uint32_t)table.num_tiles;
  table.launch.tensors[table.launch.num_tensors++] = tensor;
  table.num_tiles += num_tiles;
  return 0;
}

int32_t append_flat(Plan &plan, const fk_tensor &t) {
  const uint64_t first = (uint64_t)t.first_element, last = first + (uint64_t)t.numel - 1;
  const uint64_t tile = (uint64_t)plan.flat_tile;
  FlatTensor flat = {};
  flat.in = (const char *)t.in;
  flat.out = (char *)t.out;
  flat.out_minus = (char *)t.out_minus;
  flat.residual = (const char *)t.residual;
  flat.residual_out = (char *)t.residual_out;
  flat.first_element = first;
  flat.numel = t.numel;
  flat.stream = t.stream;
  return append<FlatLaunch, FlatTensor, kMaxFlatTensors>(plan, plan.flat, flat,
                                                         (int64_t)(last / tile - first / tile) + 1);
}

// A flat tensor as a strided one of one dimension.
fk_tensor as_strided(const fk_tensor &flat) {
  fk_tensor t = flat;
  t.ndim = 1;
  t.sizes[0] = t.numel;
  t.in_strides[0] = t.out_strides[0] = t.out_minus_strides[0] = t.element_strides[0] = 1;
  return t;
}

int32_t append_strided(Plan &plan, const fk_tensor &t) {
  const int32_t last = t.ndim - 1;
  const bool has_runs = t.element_strides[last] == 1 && !(plan.strided.launch.rows && last == 0);
  StridedTensor strided = {};
  strided.tensor = t;
  strided.run_length = has_runs ? t.sizes[last] : 1;
  strided.first_dim = has_runs ? last : t.ndim;
  // The most octets that a run can touch, wherever it begins.
  strided.slots_per_run = (strided.run_length + 2 * kOctet - 2) / kOctet;
  strided.num_slots = t.numel / strided.run_length * strided.slots_per_run;
  return append<StridedLaunch, StridedTensor, kMaxStridedTensors>(
      plan, plan.strided, strided, (strided.num_slots + plan.strided_tile - 1) / plan.strided_tile);
}

void begin(Plan &plan, int32_t dtype, bool compensated, const fk_cuda_terms &terms, const int64_t *rows,
           int64_t num_source_rows) {
  const Kernels &kernels = kernels_of(dtype);
  const TermArguments made = make_terms(terms, dtype == FK_FP64);
  const Loop loop = made.count == 1 ? kOneTerm : made.count == 2 ? kTwoTerms : kManyTerms;
  plan.never_flat = terms.family == FK_RADEMACHER && made.count > kMaxProductTerms;
  plan.flat.launch.terms = plan.strided.launch.terms = made;
  plan.flat.run = compensated && loop == kOneTerm && kernels.compensated[terms.family]
                      ? kernels.compensated[terms.family]
                      : kernels.flat[loop][terms.family];
  plan.flat_tile = kernels.flat_tile[loop][terms.family];
  plan.strided.launch.rows = rows;
  plan.strided.launch.num_source_rows = num_source_rows;
  plan.strided.run = kernels.strided[terms.family];
  plan.strided_tile = kernels.strided_tile;
}

} // namespace

int32_t fk_cuda_run(const fk_tensor *tensors, int64_t num_tensors, const int64_t *rows,
                    int64_t num_source_rows, const fk_cuda_terms *terms, void *cuda_stream) {
  cudaGetLastError(); // what an earlier call has returned already: kernels that do not load on another device, say
  Plan plan = {};
  plan.cuda_stream = cuda_stream;
  plan.num_skipped = terms->num_skipped;
  // Tensors with residuals are launched apart.
  for (int32_t kind = 0; kind < 2 * (FK_FP64 + 1); ++kind) {
    const int32_t dtype = kind / 2;
    const bool compensated = kind % 2;
    bool begun = false;
    for (int64_t i = 0; i < num_tensors; ++i) {
      const fk_tensor &t = tensors[i];
      if (t.dtype != dtype || (t.residual != 0) != compensated || t.numel == 0) continue;
      if (!begun) begin(plan, dtype, compensated, *terms, rows, num_source_rows);
      begun = true;
      const int32_t error = t.ndim            ? append_strided(plan, t)
                            : plan.never_flat ? append_strided(plan, as_strided(t))
                                              : append_flat(plan, t);
      if (error) return error;
    }
    flush(plan, plan.flat);
    flush(plan, plan.strided);
  }
  return (int32_t)cudaGetLastError();
}

int32_t fk_cuda_load_kernels(void) {
  for (int32_t dtype = FK_FP32; dtype <= FK_FP64; ++dtype) {
    if (const int32_t error = kernels_of(dtype).load()) return error;
  }
  return 0;
}
