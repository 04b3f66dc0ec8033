#include "engine.h"

#include <stdlib.h>
#include <string.h>

#include "float_mode.h"
#include "terms.h"

namespace {

// Elements of a chunk, the unit handed to threads. Results do not depend on them.
const int64_t kChunkFewTerms = 1 << 14;
const int64_t kChunkManyTerms = 1 << 13;
const int64_t kFewTerms = 8;
// Elements times terms below which waking other threads costs more than it saves (about 20 us of one core).
const int64_t kWorkForThreads = 1 << 15;

struct Job {
  const fk_tensor *tensors;
  const int64_t *first_chunk; // [num_tensors + 1]
  int64_t num_tensors;
  int64_t chunk;
  const int64_t *rows;
  const fk_terms *terms;
  const fk_ready_sides *fp32, *fp64;
  const fk_kernels *kernels;
};

// One of the two outputs of a run.
struct Side {
  char *base;
  int64_t stride;
};

struct Run { // consecutive elements of the noise, evenly spaced in memory
  uint64_t first_element;
  int64_t n;
  const char *in;
  int64_t in_stride;
  Side out, out_minus;
  const int16_t *residual; // with the stride of in
  int16_t *residual_out;   // with the stride of out
};

bool is_wide(const fk_tensor &t) { return t.out_dtype != t.dtype; }

size_t element_size(int32_t dtype) { return dtype == FK_FP64 ? 8 : dtype == FK_FP32 ? 4 : 2; }

template <typename T>
void copy_typed(const char *from, int64_t from_stride, char *to, int64_t to_stride, int64_t n) {
  const T *source = (const T *)from;
  T *target = (T *)to;
  for (int64_t i = 0; i < n; ++i) target[i * to_stride] = source[i * from_stride];
}

void copy_elements(const char *from, int64_t from_stride, char *to, int64_t to_stride, int64_t n,
                   size_t size) {
  if (from_stride == 1 && to_stride == 1) {
    memmove(to, from, (size_t)n * size);
  } else if (size == 8) {
    copy_typed<uint64_t>(from, from_stride, to, to_stride, n);
  } else if (size == 4) {
    copy_typed<uint32_t>(from, from_stride, to, to_stride, n);
  } else {
    copy_typed<uint16_t>(from, from_stride, to, to_stride, n);
  }
}

struct Buffers {
  union {
    float acc[FK_BLOCK + FK_BLOCK_PAD];
    double acc64[FK_BLOCK + FK_BLOCK_PAD];
  };
  union {
    float minus[FK_BLOCK + FK_BLOCK_PAD];
    double minus64[FK_BLOCK + FK_BLOCK_PAD];
  };
  uint32_t random_words[FK_BLOCK_WORDS + 4 * 16];
  double gathered[FK_BLOCK], written[FK_BLOCK];
  int16_t residuals[FK_BLOCK];
};

// Computes the sums of the groups that hold n elements from `element` on. Returns how many elements of the first
// group come before `element`.
int64_t block_sums(const Job &job, const fk_tensor &t, const fk_ready_terms &terms, uint64_t element,
                   int64_t n, float *acc, double *acc64) {
  const bool gaussian = job.terms->family == FK_GAUSSIAN;
  const int shift = gaussian ? FK_GAUSSIAN_GROUP_SHIFT : FK_RADEMACHER_GROUP_SHIFT;
  const int64_t skip = (int64_t)(element & ((1u << shift) - 1u));
  const int64_t groups = (skip + n + (1 << shift) - 1) >> shift;
  if (t.dtype == FK_FP64) {
    (gaussian ? job.kernels->gaussian_sums64 : job.kernels->rademacher_sums64)(acc64, element >> shift,
                                                                               groups, t.stream, &terms);
  } else {
    (gaussian ? job.kernels->gaussian_sums : job.kernels->rademacher_sums)(acc, element >> shift, groups,
                                                                           t.stream, &terms);
  }
  return skip;
}

// Sums of the minus side from those of the plus side: -acc, except for zeros. Terms that cancel exactly give +0 on
// both sides, and no term at all gives -0 (contract section 6.2): a zero of an integer sum is always one of these.
// A zero of a Gaussian sum may also be an underflow. A single product mirrors even then; for any other number of
// terms the function returns false, and the caller computes the sums anew from negated coefficients.
template <typename T> bool mirror(const T *acc, T *minus, int64_t n, int32_t family, int64_t count) {
  if (family == FK_RADEMACHER) {
    for (int64_t i = 0; i < n; ++i) minus[i] = acc[i] == (T)0 ? acc[i] : -acc[i];
    return true;
  }
  bool exact = true;
  for (int64_t i = 0; i < n; ++i) {
    minus[i] = -acc[i];
    exact &= acc[i] != (T)0;
  }
  return exact || count == 1;
}

void apply_side(const Job &job, const fk_tensor &t, const Run &run, int64_t done, int64_t n, const Side &side,
                const float *acc, const double *acc64, Buffers &buffers) {
  const size_t size = element_size(t.dtype), out_size = element_size(t.out_dtype);
  fk_apply apply = {};
  apply.in = run.in ? run.in + done * run.in_stride * (int64_t)size : 0;
  apply.out = side.base + done * side.stride * (int64_t)out_size;
  apply.acc = acc;
  apply.acc64 = acc64;
  apply.n = n;
  apply.alpha = job.terms->alpha;
  apply.residual = run.residual ? run.residual + done * run.in_stride : 0;
  apply.residual_out = run.residual_out ? run.residual_out + done * side.stride : 0;
  apply.wide = is_wide(t);
  if (job.terms->rounding == FK_STOCHASTIC && out_size == 2) {
    const uint64_t element = run.first_element + (uint64_t)done;
    const int64_t skip = (int64_t)(element & 7u);
    job.kernels->group_words(buffers.random_words, element >> FK_ROUNDING_GROUP_SHIFT, (skip + n + 7) >> 3,
                             t.stream, FK_TAG_ROUNDING, job.terms->rounding_seed);
    apply.random_bits = (const uint16_t *)buffers.random_words + skip; // little-endian: low half first
  }
  char *target = (char *)apply.out, *target_residual = (char *)apply.residual_out,
       *rest = (char *)buffers.residuals;
  if (apply.in && run.in_stride != 1) {
    copy_elements((const char *)apply.in, run.in_stride, (char *)buffers.gathered, 1, n, size);
    apply.in = buffers.gathered;
    if (apply.residual) {
      copy_elements((const char *)apply.residual, run.in_stride, rest, 1, n, sizeof(int16_t));
      apply.residual = buffers.residuals;
    }
  }
  if (side.stride != 1) {
    apply.out = buffers.written;
    if (target_residual) apply.residual_out = buffers.residuals;
  }
  job.kernels->apply[t.dtype](&apply);
  if (side.stride != 1) {
    copy_elements((const char *)buffers.written, 1, target, side.stride, n, out_size);
    if (target_residual) copy_elements(rest, 1, target_residual, side.stride, n, sizeof(int16_t));
  }
}

// The kernel that writes the sums of whole groups straight into the weights; NULL if the run needs the buffers.
fk_into_kernel into_kernel(const Job &job, const fk_tensor &t, const Run &run) {
  const bool gaussian = job.terms->family == FK_GAUSSIAN, has_one_term = job.fp32->plus.count == 1;
  const bool in_lines = run.in && run.in_stride == 1 && run.out.stride == 1 &&
                        (!run.out_minus.base || run.out_minus.stride == 1);
  const bool to_nearest = job.terms->rounding == FK_NEAREST || is_wide(t);
  if (!in_lines || !to_nearest || !(has_one_term || (gaussian && !run.out_minus.base))) return 0;
  return (gaussian ? job.kernels->gaussian_into : job.kernels->rademacher_into)[t.dtype];
}

void compute_run(const Job &job, const fk_tensor &t, const Run &run, Buffers &buffers) {
  const fk_ready_sides &ready = t.dtype == FK_FP64 ? *job.fp64 : *job.fp32;
  const size_t size = element_size(t.dtype), out_size = element_size(t.out_dtype);
  if (run.in && ready.plus.count == 0 && job.terms->alpha == 1.0 && !is_wide(t)) { // bytes stay
    if (run.out.base != run.in)
      copy_elements(run.in, run.in_stride, run.out.base, run.out.stride, run.n, size);
    if (run.out_minus.base && run.out_minus.base != run.in) {
      copy_elements(run.in, run.in_stride, run.out_minus.base, run.out_minus.stride, run.n, size);
    }
    return;
  }
  const int shift = job.terms->family == FK_GAUSSIAN ? FK_GAUSSIAN_GROUP_SHIFT : FK_RADEMACHER_GROUP_SHIFT;
  const fk_into_kernel into = into_kernel(job, t, run);
  for (int64_t done = 0; done < run.n;) {
    const uint64_t element = run.first_element + (uint64_t)done;
    const int64_t ahead = (int64_t)(element & ((1u << shift) - 1u));
    if (into && ahead == 0 && run.n - done >= FK_INTO_MULTIPLE) {
      const int64_t n = (run.n - done) / FK_INTO_MULTIPLE * FK_INTO_MULTIPLE;
      fk_apply apply = {};
      apply.in = run.in + done * (int64_t)size;
      apply.out = run.out.base + done * (int64_t)out_size;
      apply.out_minus = run.out_minus.base ? run.out_minus.base + done * (int64_t)out_size : 0;
      apply.n = n;
      apply.alpha = job.terms->alpha;
      apply.residual = run.residual ? run.residual + done : 0;
      apply.residual_out = run.residual_out ? run.residual_out + done : 0;
      apply.wide = is_wide(t);
      into(&apply, element >> shift, t.stream, &ready.plus);
      done += n;
      continue;
    }
    const int64_t room = (into && ahead ? 1 << shift : FK_BLOCK) - ahead;
    const int64_t n = run.n - done < room ? run.n - done : room;
    const int64_t skip = block_sums(job, t, ready.plus, element, n, buffers.acc, buffers.acc64);
    if (run.out_minus.base) {
      const int32_t family = job.terms->family;
      const int64_t count = ready.plus.count;
      const bool mirrored = t.dtype == FK_FP64
                                ? mirror(buffers.acc64 + skip, buffers.minus64 + skip, n, family, count)
                                : mirror(buffers.acc + skip, buffers.minus + skip, n, family, count);
      if (!mirrored) block_sums(job, t, ready.minus, element, n, buffers.minus, buffers.minus64);
      // The side that overwrites the input goes last.
      if (run.out.base == run.in) {
        apply_side(job, t, run, done, n, run.out_minus, buffers.minus + skip, buffers.minus64 + skip,
                   buffers);
        apply_side(job, t, run, done, n, run.out, buffers.acc + skip, buffers.acc64 + skip, buffers);
      } else {
        apply_side(job, t, run, done, n, run.out, buffers.acc + skip, buffers.acc64 + skip, buffers);
        apply_side(job, t, run, done, n, run.out_minus, buffers.minus + skip, buffers.minus64 + skip,
                   buffers);
      }
    } else {
      apply_side(job, t, run, done, n, run.out, buffers.acc + skip, buffers.acc64 + skip, buffers);
    }
    done += n;
  }
}

// Output elements [begin, end) of a tensor, row-major over its sizes.
void compute_range(const Job &job, const fk_tensor &t, int64_t begin, int64_t end, Buffers &buffers) {
  const int64_t size = (int64_t)element_size(t.dtype), out_size = (int64_t)element_size(t.out_dtype);
  if (t.ndim == 0) {
    const Run run = {(uint64_t)(t.first_element + begin),
                     end - begin,
                     t.in ? (const char *)t.in + begin * size : 0,
                     1,
                     {(char *)t.out + begin * out_size, 1},
                     {t.out_minus ? (char *)t.out_minus + begin * out_size : 0, 1},
                     t.residual ? t.residual + begin : 0,
                     t.residual_out ? t.residual_out + begin : 0};
    compute_run(job, t, run, buffers);
    return;
  }
  const int last = t.ndim - 1;
  // Elements along the last dimension are consecutive in the noise, unless it is gathered or strided.
  const bool has_runs = t.element_strides[last] == 1 && !(job.rows && last == 0);
  for (int64_t position = begin; position < end;) {
    int64_t rest = position, element = t.first_element, in_at = 0, out_at = 0, minus_at = 0, in_last = 0;
    for (int d = last; d >= 0; --d) {
      const int64_t i = rest % t.sizes[d];
      const int64_t x = d == 0 && job.rows ? job.rows[i] : i;
      rest /= t.sizes[d];
      if (d == last) in_last = i;
      element += x * t.element_strides[d];
      in_at += x * t.in_strides[d];
      out_at += i * t.out_strides[d];
      minus_at += i * t.out_minus_strides[d];
    }
    int64_t n = 1;
    if (has_runs) {
      n = t.sizes[last] - in_last;
      if (n > end - position) n = end - position;
    }
    const Run run = {(uint64_t)element,
                     n,
                     t.in ? (const char *)t.in + in_at * size : 0,
                     t.in_strides[last],
                     {(char *)t.out + out_at * out_size, t.out_strides[last]},
                     {t.out_minus ? (char *)t.out_minus + minus_at * out_size : 0, t.out_minus_strides[last]},
                     t.residual ? t.residual + in_at : 0,
                     t.residual_out ? t.residual_out + out_at : 0};
    compute_run(job, t, run, buffers);
    position += n;
  }
}

void compute_chunks(int64_t begin, int64_t end, void *context) {
  const Job &job = *(const Job *)context;
  Buffers buffers;
  const fk_float_mode mode = fk_enter_float_mode();
  int64_t low = 0, high = job.num_tensors; // first_chunk[low] <= begin < first_chunk[high]
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    *(job.first_chunk[middle] <= begin ? &low : &high) = middle;
  }
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    while (job.first_chunk[low + 1] <= chunk) ++low;
    const fk_tensor &t = job.tensors[low];
    const int64_t from = (chunk - job.first_chunk[low]) * job.chunk;
    const int64_t to = from + job.chunk < t.numel ? from + job.chunk : t.numel;
    compute_range(job, t, from, to, buffers);
  }
  fk_leave_float_mode(mode);
}

} // namespace

int32_t fk_run_seed_axpy(const fk_tensor *tensors, int64_t num_tensors, const int64_t *rows,
                         const fk_terms *terms, const fk_kernels *kernels, fk_parallel_for parallel_for) {
  fk_ready_sides fp32, fp64;
  memset(&fp32, 0, sizeof fp32);
  memset(&fp64, 0, sizeof fp64);
  int64_t *first_chunk = (int64_t *)malloc(sizeof(int64_t) * (size_t)(num_tensors + 1));
  bool has_fp32 = false, has_fp64 = false;
  for (int64_t i = 0; i < num_tensors; ++i) *(tensors[i].dtype == FK_FP64 ? &has_fp64 : &has_fp32) = true;
  // Making terms ready rounds coefficients: in the contract's floating-point mode, not the caller's.
  const fk_float_mode mode = fk_enter_float_mode();
  int32_t error = first_chunk ? 0 : FK_ERROR_MEMORY;
  if (!error && has_fp32) error = fk_make_ready_terms(terms, 0, kernels->lookup_terms, &fp32);
  if (!error && has_fp64) error = fk_make_ready_terms(terms, 1, kernels->lookup_terms, &fp64);
  fk_leave_float_mode(mode);
  if (!error) {
    Job job = {tensors, first_chunk, num_tensors, 0, rows, terms, &fp32, &fp64, kernels};
    job.chunk = terms->count <= kFewTerms ? kChunkFewTerms : kChunkManyTerms;
    int64_t elements = 0;
    first_chunk[0] = 0;
    for (int64_t i = 0; i < num_tensors; ++i) {
      elements += tensors[i].numel;
      first_chunk[i + 1] = first_chunk[i] + (tensors[i].numel + job.chunk - 1) / job.chunk;
    }
    const int64_t chunks = first_chunk[num_tensors];
    const bool worth_threads = elements > kWorkForThreads / (terms->count > 1 ? terms->count : 1);
    if (chunks > 1 && worth_threads && parallel_for) {
      parallel_for(0, chunks, 1, compute_chunks, &job);
    } else if (chunks > 0) {
      compute_chunks(0, chunks, &job);
    }
  }
  fk_free_ready_terms(&fp32);
  fk_free_ready_terms(&fp64);
  free(first_chunk);
  return error;
}
