// Graph attention, backward; see attention.h.

#include "attention.h"

namespace acgkd_fast::cuda {
namespace {

template <class T>
struct Backward : Attention<T> {
  int64_t capacity;  // stored entries, those behind the last row included
  const int* t_rowptr;
  Entries<T> t_entries;
  const T* grad_out;
  const T* out;
  const Wide<T>* highest;
  const Wide<T>* total;
  Wide<T>* paired;     // <grad_out, out>, which receivers leave to senders
  Wide<T>* own_slope;  // d loss / d score of a self-loop, likewise
  Wide<T>* slopes;     // gradients of the entries on their way to grad_value; the same memory unless T is narrower
  T* grad_sent;
  T* grad_source;
  T* grad_target;
  T* grad_value;

  __device__ __forceinline__ Wide<T> step(int64_t receiver, int64_t sender) const {
    return share(this->score(receiver, sender), highest[receiver]) / total[receiver];
  }
};

// Gradients of the targets and of the entries: a warp for all heads of a row.
template <class T>
__global__ void __launch_bounds__(kThreads, 2) receivers_kernel(Backward<T> a) {
  using W = Wide<T>;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  for (int64_t e = a.rowptr[a.nodes] + static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; e < a.capacity;
       e += static_cast<int64_t>(gridDim.x) * kThreads) {
    a.grad_value[e] = static_cast<T>(W(0));
  }
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (row >= a.nodes) {
    return;
  }
  const Span span = row_span(a.rowptr, row);
  for (int head = 0; head < a.heads; ++head) {
    const int64_t at = row * a.heads + head;
    W dots[2] = {};
    for (int64_t i = at * a.width + lane; i < (at + 1) * a.width; i += kWarp) {
      const W grad = static_cast<W>(a.grad_out[i]);
      dots[0] += grad * static_cast<W>(a.out[i]);
      dots[1] += grad * static_cast<W>(a.sent[i]);
    }
    group_sum(dots, kWarp);
    const W paired = dots[0];
    const W own = a.loops ? a.step(at, at) * (dots[1] - paired) * a.slope_at(at, at) : W(0);
    W target = 0;
    for (unsigned base = 0; base < span.length; base += kWarp) {
      const W dot = entry_dot<T>(a.grad_out, a.sent, a.entries.col, span, base, a, at);
      const unsigned k = base + lane;
      if (k < span.length) {
        const int64_t entry = span.begin + k;
        const int64_t sender = static_cast<int64_t>(a.entries.col[entry]) * a.heads + head;
        const W slope = a.step(at, sender) * (dot - paired);
        // Every head finds the entry in the same lane.
        a.slopes[entry] = head == 0 ? slope : a.slopes[entry] + slope;
        target += a.entries.template value_of<false>(entry) * slope * a.slope_at(at, sender);
      }
    }
    target = group_sum(target, kWarp) + own;
    if (lane == 0) {
      a.paired[at] = paired;
      a.own_slope[at] = own;
      a.grad_target[at] = static_cast<T>(target);
    }
  }
  if constexpr (!std::is_same_v<T, W>) {
    for (unsigned k = lane; k < span.length; k += kWarp) {
      a.grad_value[span.begin + k] = static_cast<T>(a.slopes[span.begin + k]);
    }
  }
}

// Gradients of what is sent and of the sources, after the receivers.
template <class T, bool kTied>
__global__ void __launch_bounds__(kThreads, 2) senders_kernel(Backward<T> a) {
  using W = Wide<T>;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (at >= a.nodes * a.heads) {
    return;
  }
  const int head = static_cast<int>(at % a.heads);
  const Entries<T>& entries = kTied ? a.entries : a.t_entries;
  const Span span = row_span(kTied ? a.rowptr : a.t_rowptr, at / a.heads);
  const auto weigh = [&](int64_t entry, int64_t receiver) {
    return entries.template value_of<!kTied>(entry) * a.step(receiver, at);
  };
  W source = 0;
  for (unsigned base = 0; base < span.length; base += kWarp) {
    const W dot = entry_dot<T>(a.sent, a.grad_out, entries.col, span, base, a, at);
    if (base + lane < span.length) {
      const int64_t entry = span.begin + base + lane;
      const int64_t receiver = static_cast<int64_t>(entries.col[entry]) * a.heads + head;
      source += weigh(entry, receiver) * (dot - a.paired[receiver]) * a.slope_at(receiver, at);
    }
  }
  source = group_sum(source, kWarp) + a.own_slope[at];
  if (lane == 0) {
    a.grad_source[at] = static_cast<T>(source);
  }
  const W own = a.loops ? a.step(at, at) : W(0);
  weigh_rows<T>(a.grad_out, entries.col, span, a, at, own, W(1), weigh, a.grad_sent);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gat_propagate_backward(
    Tensor grad_out, Tensor sent, Tensor source, Tensor target, Tensor value, Tensor out, Tensor highest, Tensor total,
    Tensor rowptr, Tensor col, OptionalTensor t_rowptr, OptionalTensor t_col, OptionalTensor t_edge,
    double negative_slope, bool add_self_loops) {
  check_operands(sent, value, rowptr, col, "sent");
  check_scores(sent, source, target);
  check_like(grad_out, sent, "grad_out", "sent");
  check_like(out, sent, "out", "sent");
  Transpose transpose{t_rowptr, t_col, t_edge};
  transpose.check(rowptr, col.numel());
  const DeviceScope device(sent);
  grad_out = dense(grad_out), sent = dense(sent), source = dense(source), target = dense(target), out = dense(out);
  value = dense(value), rowptr = dense(rowptr), col = dense(col), highest = dense(highest), total = dense(total);
  return dispatch_storage(sent, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using W = Wide<T>;
    check_kept<T>(highest, sent, source.numel(), "highest");
    check_kept<T>(total, sent, source.numel(), "total");
    const auto like = [](const Tensor& x, ScalarType type) { return empty(x, {x.size(0), x.size(1)}, type); };
    const Tensor grad_sent = like(sent, sent.scalar_type());
    const Tensor grad_source = like(source, sent.scalar_type()), grad_target = like(source, sent.scalar_type());
    const Tensor grad_value = empty(value, {value.numel()}, value.scalar_type());
    const Tensor paired = like(source, kWideType<T>), own_slope = like(source, kWideType<T>);
    const Tensor slopes = std::is_same_v<T, W> ? grad_value : empty(value, {value.numel()}, kWideType<T>);
    Backward<T> a{attention_arguments<T>(sent, source, target, value, rowptr, col, negative_slope, add_self_loops),
                  col.numel(),
                  nullptr,
                  {},
                  read<T>(grad_out),
                  read<T>(out),
                  read<W>(highest),
                  read<W>(total),
                  write<W>(paired),
                  write<W>(own_slope),
                  write<W>(slopes),
                  write<T>(grad_sent),
                  write<T>(grad_source),
                  write<T>(grad_target),
                  write<T>(grad_value)};
    // One block even without rows: capacity is still to be zeroed.
    const int64_t rows = std::max<int64_t>(1, ceil_div(a.nodes, kWarps));
    launch(device.stream, receivers_kernel<T>, rows, kThreads, 0, a);
    if (transpose.rowptr) {
      a.t_rowptr = read<int>(*transpose.rowptr);
      a.t_entries = {read<int>(*transpose.col), read<T>(value), read<int>(*transpose.edge)};
    }
    if (a.nodes > 0) {
      const int64_t blocks = ceil_div(a.nodes * a.heads, kWarps);
      launch(device.stream, a.t_rowptr == nullptr ? senders_kernel<T, true> : senders_kernel<T, false>, blocks, kThreads,
             0, a);
    }
    return std::make_tuple(grad_sent, grad_source, grad_target, grad_value);
  });
}

}  // namespace
}  // namespace acgkd_fast::cuda

STABLE_TORCH_LIBRARY_IMPL(ACGKD_FAST_NAMESPACE, ACGKD_FAST_DISPATCH_KEY, m) {
  m.impl("gat_propagate_backward", TORCH_BOX(&acgkd_fast::cuda::gat_propagate_backward));
}
