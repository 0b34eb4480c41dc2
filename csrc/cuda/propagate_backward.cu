// GCN and GIN message passing, backward: node, entry, degree and eps gradients in one sweep over the entries.
//
// With g_i = s_i grad_out_i (s = 1 for GIN) and w the weight of a node's own row:
//   grad_x_i      = s_i (sum_j A_ji g_j + w g_i)
//   grad_degree_i = -s_i^2 / 2 (<grad_out_i, out_i> + <x_i, grad_x_i>)                 (GCN)
//   grad_A_ij     = <g_i, s_j x_j> + grad_degree_i
//   grad_eps      = sum_i <grad_out_i, x_i>                                            (GIN)
// Where A equals its transpose, row i gathers g_j once and uses it twice: for grad_x_i, and with x_i for the entry
// gradient of the mirror image (j, i), which entry (i, j) may carry as only the sum of the two is defined. A directed
// matrix takes a second sweep, over its rows.
// An entry's gradient waits for its row's degree gradient: lanes keep the dot products of the first entries in
// registers, those of further entries go to memory and are read back by the thread that wrote them.

#include "propagate.h"

namespace acgkd_fast::cuda {
namespace {

template <class T>
struct Backward {
  Plan plan;
  int64_t nodes;
  int64_t capacity;  // stored entries, those behind the last row included
  const T* grad_out;
  const T* x;
  const T* out;           // GCN
  const Wide<T>* scale;   // null for GIN
  const int* rowptr;
  Entries<T> entries;
  const int* t_rowptr;    // the transpose; null where A is symmetric
  Entries<T> t_entries;
  SelfWeight self;
  T* grad_x;
  T* grad_value;
  Wide<T>* dots;          // dot products on their way to grad_value; the same memory unless T is narrower
  Wide<T>* grad_degree;   // null for GIN
  double* eps_partial;    // one per block, GIN
};

// Writes one tile of grad_x and returns this thread's part of the row's inner product: for the degree gradient
// (GCN: <grad_out, out> + <x, grad_x>) or for eps (GIN: <grad_out, x>).
template <class T, bool kVector>
__device__ __forceinline__ Wide<T> finish_tile(const Backward<T>& a, const Lane<T, kVector>& at, int64_t row,
                                               int feature, Wide<T> own_scale, Wide<T> self,
                                               const Share<T, kVector>& sum) {
  using W = Wide<T>;
  const int64_t offset = row * a.plan.width;
  Share<T, kVector> grad, own, grad_x;
  at.load(a.grad_out + offset, feature, grad);
  at.load(a.x + offset, feature, own);
  W inner = 0;
#pragma unroll
  for (int c = 0; c < kElements<T, kVector>; ++c) {
    grad_x[c] = own_scale * (sum[c] + self * (own_scale * grad[c]));
    inner += a.scale != nullptr ? own[c] * grad_x[c] : own[c] * grad[c];
  }
  at.store(a.grad_x + offset, feature, grad_x);
  if (a.scale != nullptr) {
    Share<T, kVector> out;
    at.load(a.out + offset, feature, out);
#pragma unroll
    for (int c = 0; c < kElements<T, kVector>; ++c) {
      inner += grad[c] * out[c];
    }
  }
  return inner;
}

// One row, by a group of lanes (kBlock = false) or by all groups of the block. All lanes of a warp must call it with
// the same kBlock; those without a row pass active = false. Returns the row's inner product in one thread, 0 in others.
template <bool kBlock, bool kTied, class T, bool kVector>
__device__ __forceinline__ Wide<T> backward_row(const Backward<T>& a, const Lane<T, kVector>& at,
                                                const Source<T>& gradients, Wide<T> self, Wide<T>* partial,
                                                int64_t row, bool active) {
  using W = Wide<T>;
  const unsigned start = kBlock ? at.group * kUnroll : 0;
  const unsigned step = kBlock ? at.groups * kUnroll : kUnroll;
  const auto trips = [step](unsigned length) {
    // Lanes of a warp that serve several rows stay together for the exchange of sums.
    return ((kBlock ? length : __reduce_max_sync(kAllLanes, length)) + step - 1) / step;
  };
  const bool finishes = active && (!kBlock || at.group == 0);
  const Span span = active ? row_span(a.rowptr, row) : Span{};
  const W own_scale = active && a.scale != nullptr ? a.scale[row] : W(1);
  Dots<T> dots{a.dots + span.begin, kBlock ? 0u : static_cast<unsigned>(at.lanes), true, W(0)};
  Share<T, kVector> own;

  W inner = 0;
  {
    const Span back = kTied || !active ? span : row_span(a.t_rowptr, row);
    const Entries<T>& entries = kTied ? a.entries : a.t_entries;
    const unsigned count = trips(back.length);
    for (int tile = 0; tile < a.plan.tiles; ++tile) {
      const int feature = at.first_feature(tile);
      Share<T, kVector> sum{};
      at.load(a.x + row * a.plan.width, active ? feature : a.plan.width, own);
      dots.fresh = tile == 0;
      sweep<true, kTied, !kTied>(at, feature, gradients, entries, back, start, step, count, own, sum, dots);
      if constexpr (kBlock) {
        block_sum(at, sum, partial);
      }
      if (finishes) {
        inner += finish_tile(a, at, row, feature, own_scale, self, sum);
      }
    }
  }
  inner = group_sum(inner, at.lanes);
  W row_term = 0;
  if (a.scale != nullptr) {
    row_term = W(-0.5) * own_scale * own_scale * inner;
    if (finishes && at.lane == 0) {
      a.grad_degree[row] = row_term;
    }
    if constexpr (kBlock) {
      if (threadIdx.x == 0) {
        partial[0] = row_term;
      }
      __syncthreads();
      row_term = partial[0];
    }
  }

  if constexpr (!kTied) {
    const Source<T> features{a.x, 0, a.scale, 0, a.plan.width};
    const unsigned count = trips(span.length);
    for (int tile = 0; tile < a.plan.tiles; ++tile) {
      const int feature = at.first_feature(tile);
      Share<T, kVector> no_sum;
      at.load(a.grad_out + row * a.plan.width, active ? feature : a.plan.width, own);
      dots.fresh = tile == 0;
      sweep<false, true, false>(at, feature, features, a.entries, span, start, step, count, own, no_sum, dots);
    }
  }
  if constexpr (kBlock) {
    // The dot products of all groups are in memory, and `partial` is free again.
    __syncthreads();
  }
  const unsigned writers = kBlock ? kThreads : at.lanes;
  for (unsigned k = kBlock ? threadIdx.x : at.lane; k < span.length; k += writers) {
    const W dot = k < dots.held ? dots.kept : dots.memory[k];
    a.grad_value[span.begin + k] = static_cast<T>(own_scale * dot + row_term);
  }
  return finishes && at.lane == 0 ? inner : W(0);
}

template <class T, bool kVector, bool kTied, bool kWindow>
__global__ void __launch_bounds__(kThreads, 2) backward_kernel(Backward<T> a) {
  using W = Wide<T>;
  ACGKD_FAST_DYNAMIC_SHARED(shared);
  W* partial = reinterpret_cast<W*>(shared);
  const Lane<T, kVector> at(a.plan);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * a.plan.rows_per_block;
  const int rows = static_cast<int>(a.nodes - first < a.plan.rows_per_block ? a.nodes - first : a.plan.rows_per_block);
  const W self = a.self.template read<W>();
  Source<T> gradients{a.grad_out, 0, a.scale, 0, a.plan.width};

  // Capacity behind the last row belongs to no row.
  for (int64_t e = a.rowptr[a.nodes] + static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; e < a.capacity;
       e += static_cast<int64_t>(gridDim.x) * kThreads) {
    a.grad_value[e] = static_cast<T>(W(0));
  }

  if constexpr (kWindow) {
    const Window window = find_window(a.rowptr, a.entries.col, first, rows, a.plan.staged_rows, a.nodes,
                                      reinterpret_cast<int*>(shared));
    T* staged = reinterpret_cast<T*>(shared + kPartialBytes<T>);
    if (stage(a.grad_out, a.plan, window, a.rowptr[first + rows] - static_cast<int64_t>(a.rowptr[first]), staged)) {
      gradients.rows = staged;
      gradients.first_row = window.first;
    }
  }

  const auto is_long = [&](int64_t row) {
    return row_span(a.rowptr, row).length > a.plan.long_row ||
           (!kTied && row_span(a.t_rowptr, row).length > a.plan.long_row);
  };
  double eps = 0;
  bool has_long = false;
  for (int base = 0; base < rows; base += at.groups) {
    const int64_t row = first + base + at.group;
    const bool exists = base + at.group < rows;
    const bool is_split = exists && is_long(row);
    has_long |= is_split;
    eps += backward_row<false, kTied>(a, at, gradients, self, partial, row, exists && !is_split);
  }
  if (__syncthreads_or(has_long)) {
    for (int r = 0; r < rows; ++r) {
      if (is_long(first + r)) {
        eps += backward_row<true, kTied>(a, at, gradients, self, partial, first + r, true);
      }
    }
  }
  if (a.eps_partial != nullptr) {
    // All paths above end behind a barrier that follows their last use of this memory.
    double* groups = reinterpret_cast<double*>(shared);
    if (at.lane == 0) {
      groups[at.group] = eps;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      for (int group = 1; group < at.groups; ++group) {
        eps += groups[group];
      }
      a.eps_partial[blockIdx.x] = eps;
    }
  }
}

// Adds up what the blocks found, in the same order every time.
__global__ void __launch_bounds__(kThreads)
    eps_kernel(const double* partial, int64_t blocks, ScalarType type, void* grad_eps) {
  ACGKD_FAST_DYNAMIC_SHARED(shared);
  double* warps = reinterpret_cast<double*>(shared);
  double sum = 0;
  for (int64_t i = threadIdx.x; i < blocks; i += kThreads) {
    sum += partial[i];
  }
  sum = group_sum(sum, kWarp);
  if (threadIdx.x % kWarp == 0) {
    warps[threadIdx.x / kWarp] = sum;
  }
  __syncthreads();
  if (threadIdx.x != 0) {
    return;
  }
  for (int warp = 1; warp < kWarps; ++warp) {
    sum += warps[warp];
  }
  switch (type) {
    case ScalarType::Double:
      *static_cast<double*>(grad_eps) = sum;
      break;
    case ScalarType::BFloat16:
      *static_cast<c10::BFloat16*>(grad_eps) = static_cast<float>(sum);
      break;
    default:
      *static_cast<float*>(grad_eps) = static_cast<float>(sum);
  }
}

template <class T>
int64_t plan_backward(Backward<T>& a) {
  a.plan = make_plan<T>(a.nodes, a.capacity, a.plan.width, aligned16({a.grad_out, a.x, a.out, a.grad_x}),
                        multiprocessors(), a.t_rowptr == nullptr, false);
  // One block even without rows: capacity is still to be zeroed.
  return std::max<int64_t>(1, ceil_div(a.nodes, a.plan.rows_per_block));
}

template <class T>
void run_backward(cudaStream_t stream, const Backward<T>& a, int64_t blocks) {
  const size_t shared = kPartialBytes<T> + static_cast<size_t>(a.plan.staged_rows) * a.plan.width * sizeof(T);
  with_flags(a.plan.vector, a.t_rowptr == nullptr, [&](auto vector, auto tied) {
    if constexpr (vector.value && tied.value) {
      if (a.plan.staged_rows > 0) {
        launch(stream, backward_kernel<T, true, true, true>, blocks, kThreads, shared, a);
        return;
      }
    }
    launch(stream, backward_kernel<T, vector.value, tied.value, false>, blocks, kThreads, shared, a);
  });
}

template <class T>
Backward<T> backward_arguments(const Tensor& grad_out, const Tensor& x, const Tensor& value, const Tensor& rowptr,
                               const Tensor& col, const Transpose& transpose, const Tensor& grad_x,
                               const Tensor& grad_value, const OptionalTensor& wide_dots) {
  Backward<T> a{};
  a.plan.width = static_cast<int>(x.size(1));
  a.nodes = x.size(0);
  a.capacity = col.numel();
  a.grad_out = read<T>(grad_out);
  a.x = read<T>(x);
  a.rowptr = read<int>(rowptr);
  a.entries = {read<int>(col), read<T>(value), nullptr};
  if (transpose.rowptr) {
    a.t_rowptr = read<int>(*transpose.rowptr);
    a.t_entries = {read<int>(*transpose.col), read<T>(value), read<int>(*transpose.edge)};
  }
  a.grad_x = write<T>(grad_x);
  a.grad_value = write<T>(grad_value);
  a.dots = write<Wide<T>>(wide_dots ? *wide_dots : grad_value);
  return a;
}

template <class T>
OptionalTensor wide_dots_for(const Tensor& value) {
  if constexpr (std::is_same_v<T, Wide<T>>) {
    return std::nullopt;
  } else {
    return empty(value, {value.numel()}, kWideType<T>);
  }
}

std::tuple<Tensor, Tensor, Tensor> gcn_propagate_backward(Tensor grad_out, Tensor x, Tensor out, Tensor value,
                                                          Tensor scale, Tensor rowptr, Tensor col,
                                                          OptionalTensor t_rowptr, OptionalTensor t_col,
                                                          OptionalTensor t_edge, bool add_self_loops) {
  check_operands(x, value, rowptr, col);
  check_like(grad_out, x, "grad_out");
  check_like(out, x, "out");
  Transpose transpose{t_rowptr, t_col, t_edge};
  transpose.check(rowptr, col.numel());
  const DeviceScope device(x);
  grad_out = dense(grad_out), x = dense(x), out = dense(out), value = dense(value), scale = dense(scale);
  rowptr = dense(rowptr), col = dense(col);
  return dispatch_storage(x, [&](auto tag) {
    using T = typename decltype(tag)::type;
    check_kept<T>(scale, x, x.size(0), "scale");
    const Tensor grad_x = empty(x, {x.size(0), x.size(1)}, x.scalar_type());
    const Tensor grad_value = empty(value, {value.numel()}, value.scalar_type());
    const Tensor grad_degree = empty(x, {x.size(0)}, kWideType<T>);
    const OptionalTensor wide_dots = wide_dots_for<T>(value);
    Backward<T> a =
        backward_arguments<T>(grad_out, x, value, rowptr, col, transpose, grad_x, grad_value, wide_dots);
    a.out = read<T>(out);
    a.scale = read<Wide<T>>(scale);
    a.self = {nullptr, ScalarType::Float, add_self_loops};
    a.grad_degree = write<Wide<T>>(grad_degree);
    const int64_t blocks = plan_backward(a);
    run_backward(device.stream, a, blocks);
    return std::make_tuple(grad_x, grad_value, grad_degree);
  });
}

std::tuple<Tensor, Tensor, Tensor> gin_propagate_backward(Tensor grad_out, Tensor x, Tensor value, Tensor eps,
                                                          Tensor rowptr, Tensor col, OptionalTensor t_rowptr,
                                                          OptionalTensor t_col, OptionalTensor t_edge) {
  check_operands(x, value, rowptr, col);
  check_like(grad_out, x, "grad_out");
  Transpose transpose{t_rowptr, t_col, t_edge};
  transpose.check(rowptr, col.numel());
  const DeviceScope device(x);
  grad_out = dense(grad_out), x = dense(x), value = dense(value), rowptr = dense(rowptr), col = dense(col);
  return dispatch_storage(x, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const Tensor grad_x = empty(x, {x.size(0), x.size(1)}, x.scalar_type());
    const Tensor grad_value = empty(value, {value.numel()}, value.scalar_type());
    const Tensor grad_eps = torch::stable::empty_like(eps);
    const OptionalTensor wide_dots = wide_dots_for<T>(value);
    Backward<T> a =
        backward_arguments<T>(grad_out, x, value, rowptr, col, transpose, grad_x, grad_value, wide_dots);
    a.self = gin_weight(eps, x);
    const int64_t blocks = plan_backward(a);
    const Tensor eps_partial = empty(x, {blocks}, ScalarType::Double);
    a.eps_partial = write<double>(eps_partial);
    run_backward(device.stream, a, blocks);
    launch(device.stream, eps_kernel, 1, kThreads, kWarps * sizeof(double), read<double>(eps_partial), blocks,
           eps.scalar_type(), grad_eps.mutable_data_ptr());
    return std::make_tuple(grad_x, grad_value, grad_eps);
  });
}

}  // namespace
}  // namespace acgkd_fast::cuda

STABLE_TORCH_LIBRARY_IMPL(ACGKD_FAST_NAMESPACE, ACGKD_FAST_DISPATCH_KEY, m) {
  m.impl("gcn_propagate_backward", TORCH_BOX(&acgkd_fast::cuda::gcn_propagate_backward));
  m.impl("gin_propagate_backward", TORCH_BOX(&acgkd_fast::cuda::gin_propagate_backward));
}
