// GCN and GIN message passing, forward: out_i = s_i (sum_j A_ij s_j x_j + w s_i x_i).
//
// GCN: s = D^-1/2 from the row sums of A, w = 1 with self-loops. GIN: s = 1, w = 1 + eps. A block serves consecutive
// rows. The window variant is for batches of small graphs: it works out which nodes its rows refer to, adds up their
// degrees itself (no degree launch) and keeps their features in shared memory where they are read more than once.
// The other variant reads degrees and features from global memory. Sums run in the order of the entries in both.

#include "propagate.h"

namespace acgkd_fast::cuda {
namespace {

template <class T>
struct Forward {
  Plan plan;
  int64_t nodes;
  const T* x;
  const int* rowptr;
  Entries<T> entries;
  Wide<T>* scale;  // null for GIN
  SelfWeight self;
  T* out;
};

constexpr int kRowsPerDegreeBlock = kThreads / kDegreeLanes;

template <class T>
__global__ void __launch_bounds__(kThreads)
    degree_kernel(const int* rowptr, const T* value, bool self_loops, int64_t nodes, unsigned long_row,
                  Wide<T>* scale) {
  ACGKD_FAST_DYNAMIC_SHARED(shared);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kRowsPerDegreeBlock;
  const int count = static_cast<int>(nodes - first < kRowsPerDegreeBlock ? nodes - first : kRowsPerDegreeBlock);
  inverse_root_degrees(rowptr, value, self_loops, first, count, long_row, scale + first,
                       reinterpret_cast<Wide<T>*>(shared));
}

// One tile of a row's result from its finished sum over the neighbours.
template <class T, bool kVector>
__device__ __forceinline__ void finish_tile(const Forward<T>& a, const Lane<T, kVector>& at, int64_t row, int feature,
                                            Wide<T> own_scale, Wide<T> self, const Share<T, kVector>& sum) {
  const int64_t offset = row * a.plan.width;
  Share<T, kVector> result;
  at.load(a.x + offset, feature, result);
#pragma unroll
  for (int c = 0; c < kElements<T, kVector>; ++c) {
    result[c] = own_scale * (sum[c] + self * (own_scale * result[c]));
  }
  at.store(a.out + offset, feature, result);
}

template <class T, bool kVector, bool kWindow>
__global__ void __launch_bounds__(kThreads, 2) forward_kernel(Forward<T> a) {
  using W = Wide<T>;
  ACGKD_FAST_DYNAMIC_SHARED(shared);
  W* partial = reinterpret_cast<W*>(shared);
  const Lane<T, kVector> at(a.plan);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * a.plan.rows_per_block;
  const int rows = static_cast<int>(a.nodes - first < a.plan.rows_per_block ? a.nodes - first : a.plan.rows_per_block);
  const W self = a.self.template read<W>();
  Source<T> source{a.x, 0, a.scale, 0, a.plan.width};

  if constexpr (kWindow) {
    const int limit = a.plan.fold_degrees ? static_cast<int>(a.nodes) : a.plan.staged_rows;
    const Window window =
        find_window(a.rowptr, a.entries.col, first, rows, limit, a.nodes, reinterpret_cast<int*>(shared));
    unsigned char* free_bytes = shared + kPartialBytes<T>;
    if (a.plan.fold_degrees) {
      W* scale = reinterpret_cast<W*>(free_bytes);
      free_bytes += shared_scale_bytes<T>(a.nodes);
      inverse_root_degrees(a.rowptr, a.entries.value, a.self.self_loops, window.first, window.count, a.plan.long_row,
                           scale, partial);
      source.scale = scale;
      source.first_scale = window.first;
      for (int r = static_cast<int>(threadIdx.x); r < rows; r += kThreads) {
        a.scale[first + r] = scale[first + r - window.first];
      }
    }
    if constexpr (kVector) {
      T* staged = reinterpret_cast<T*>(free_bytes);
      if (stage(a.x, a.plan, window, a.rowptr[first + rows] - static_cast<int64_t>(a.rowptr[first]), staged)) {
        source.rows = staged;
        source.first_row = window.first;
      }
    }
  }

  Dots<T> no_dots{};
  const Share<T, kVector> no_own{};
  bool has_long = false;
  for (int r = at.group; r < rows; r += at.groups) {
    const int64_t row = first + r;
    const Span span = row_span(a.rowptr, row);
    if (span.length > a.plan.long_row) {
      has_long = true;
      continue;
    }
    const W own_scale = source.factor(static_cast<int>(row));
    for (int tile = 0; tile < a.plan.tiles; ++tile) {
      const int feature = at.first_feature(tile);
      Share<T, kVector> sum{};
      sweep<true, false, false>(at, feature, source, a.entries, span, 0, kUnroll, (span.length + kUnroll - 1) / kUnroll,
                         no_own, sum, no_dots);
      finish_tile(a, at, row, feature, own_scale, self, sum);
    }
  }
  if (!__syncthreads_or(has_long)) {
    return;
  }
  const unsigned step = static_cast<unsigned>(at.groups) * kUnroll;
  for (int r = 0; r < rows; ++r) {
    const int64_t row = first + r;
    const Span span = row_span(a.rowptr, row);
    if (span.length <= a.plan.long_row) {
      continue;
    }
    const W own_scale = source.factor(static_cast<int>(row));
    for (int tile = 0; tile < a.plan.tiles; ++tile) {
      const int feature = at.first_feature(tile);
      Share<T, kVector> sum{};
      sweep<true, false, false>(at, feature, source, a.entries, span, at.group * kUnroll, step,
                         (span.length + step - 1) / step, no_own, sum, no_dots);
      block_sum(at, sum, partial);
      if (at.group == 0) {
        finish_tile(a, at, row, feature, own_scale, self, sum);
      }
    }
  }
}

template <class T>
void run_forward(cudaStream_t stream, Forward<T> a, int64_t capacity) {
  if (a.nodes == 0) {
    return;
  }
  const bool gcn = a.scale != nullptr;
  a.plan = make_plan<T>(a.nodes, capacity, a.plan.width, aligned16({a.x, a.out}), multiprocessors(), true, gcn);
  size_t shared = kPartialBytes<T>;
  if (a.plan.fold_degrees) {
    shared += shared_scale_bytes<T>(a.nodes);
  } else if (gcn) {
    launch(stream, degree_kernel<T>, ceil_div(a.nodes, kRowsPerDegreeBlock), kThreads, kPartialBytes<T>, a.rowptr,
           a.entries.value, a.self.self_loops, a.nodes, a.plan.long_row, a.scale);
  }
  shared += static_cast<size_t>(a.plan.staged_rows) * a.plan.width * sizeof(T);
  with_flags(a.plan.vector, a.plan.fold_degrees || a.plan.staged_rows > 0, [&](auto vector, auto window) {
    launch(stream, forward_kernel<T, vector.value, window.value>, ceil_div(a.nodes, a.plan.rows_per_block), kThreads,
           shared, a);
  });
}

template <class T>
Forward<T> forward_arguments(const Tensor& x, const Tensor& value, const Tensor& rowptr, const Tensor& col,
                             SelfWeight self, const Tensor& out) {
  Forward<T> a{};
  a.plan.width = static_cast<int>(x.size(1));
  a.nodes = x.size(0);
  a.x = read<T>(x);
  a.rowptr = read<int>(rowptr);
  a.entries = {read<int>(col), read<T>(value), nullptr};
  a.self = self;
  a.out = write<T>(out);
  return a;
}

std::tuple<Tensor, Tensor> gcn_propagate(Tensor x, Tensor value, OptionalTensor /*port*/, OptionalTensor /*table*/,
                                         Tensor rowptr, Tensor col, OptionalTensor /*t_rowptr*/,
                                         OptionalTensor /*t_col*/, OptionalTensor /*t_edge*/, bool add_self_loops,
                                         int64_t /*kind*/) {
  check_operands(x, value, rowptr, col);
  const DeviceScope device(x);
  x = dense(x), value = dense(value), rowptr = dense(rowptr), col = dense(col);
  return dispatch_storage(x, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const Tensor out = empty(x, {x.size(0), x.size(1)}, x.scalar_type());
    const Tensor scale = empty(x, {x.size(0)}, kWideType<T>);
    Forward<T> a = forward_arguments<T>(x, value, rowptr, col, {nullptr, ScalarType::Float, add_self_loops}, out);
    a.scale = write<Wide<T>>(scale);
    run_forward(device.stream, a, col.numel());
    return std::make_tuple(out, scale);
  });
}

Tensor gin_propagate(Tensor x, Tensor value, Tensor eps, OptionalTensor /*port*/, OptionalTensor /*table*/,
                     Tensor rowptr, Tensor col, OptionalTensor /*t_rowptr*/, OptionalTensor /*t_col*/,
                     OptionalTensor /*t_edge*/, int64_t /*kind*/) {
  check_operands(x, value, rowptr, col);
  const DeviceScope device(x);
  x = dense(x), value = dense(value), rowptr = dense(rowptr), col = dense(col);
  return dispatch_storage(x, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const Tensor out = empty(x, {x.size(0), x.size(1)}, x.scalar_type());
    run_forward(device.stream, forward_arguments<T>(x, value, rowptr, col, gin_weight(eps, x), out), col.numel());
    return out;
  });
}

}  // namespace
}  // namespace acgkd_fast::cuda

STABLE_TORCH_LIBRARY_IMPL(ACGKD_FAST_NAMESPACE, ACGKD_FAST_DISPATCH_KEY, m) {
  m.impl("gcn_propagate", TORCH_BOX(&acgkd_fast::cuda::gcn_propagate));
  m.impl("gin_propagate", TORCH_BOX(&acgkd_fast::cuda::gin_propagate));
}
