// Graph attention, forward and backward: the softmax of scores over a node's neighbours, and the sum that it weighs.
//
//   score_ij = leaky_relu(source_j + target_i),  share_ij = A_ij exp(score_ij - highest_i),  total_i = sum_j share_ij
//   out_i    = sum_j share_ij sent_j / total_i,  the node itself among its neighbours where self-loops are added
//
// With step_ij = exp(score_ij - highest_i) / total_i, the attention that an edge of weight 1 has:
//   grad_A_ij     = step_ij <grad_out_i, sent_j - out_i>, summed over heads;  grad_score_ij = A_ij times one head's
//   grad_sent_j   = sum_i A_ij step_ij grad_out_i
// A warp serves one head of one node and looks at its entries three times: for the largest score, for the sum, and for
// the features that they weigh. Backward is a launch over receivers (all heads of a row, as its entries are theirs
// together) and one over senders. Scores are worked out again wherever they are needed, so none is stored.

#include <cmath>

#include "propagate.h"

namespace acgkd_fast::cuda {
namespace {

// Channels of a lane and tile.
constexpr int kChannels = 4;

// What both directions read. Rows of features are those of a node's heads, one after the other; scores, `highest` and
// `total` have a number each for them.
template <class T>
struct Attention {
  int64_t nodes;
  int heads;
  int width;  // channels of a head
  const T* sent;
  const T* source;
  const T* target;
  const int* rowptr;
  Entries<T> entries;
  Wide<T> slope;
  bool loops;

  __device__ __forceinline__ Wide<T> before_slope(int64_t receiver, int64_t sender) const {
    return static_cast<Wide<T>>(source[sender]) + static_cast<Wide<T>>(target[receiver]);
  }
  __device__ __forceinline__ Wide<T> score(int64_t receiver, int64_t sender) const {
    const Wide<T> before = before_slope(receiver, sender);
    return before > 0 ? before : slope * before;
  }
  __device__ __forceinline__ Wide<T> slope_at(int64_t receiver, int64_t sender) const {
    return before_slope(receiver, sender) > 0 ? Wide<T>(1) : slope;
  }
};

// e^(score - highest). Scores of absent edges may lie above the largest of those that are there; beyond 30 e^x is of no
// use.
template <class W>
__device__ __forceinline__ W share(W score, W highest) {
  const W shifted = score - highest;
  return static_cast<W>(exp(shifted > W(30) ? W(30) : shifted));
}

template <class V>
__device__ __forceinline__ V warp_max(V value) {
  for (int offset = kWarp / 2; offset > 0; offset >>= 1) {
    const V other = __shfl_xor_sync(kAllLanes, value, offset);
    value = other > value ? other : value;
  }
  return value;
}

// Entries of a stretch of at most kWarp.
__device__ __forceinline__ unsigned stretch(Span span, unsigned base) {
  return span.length - base < kWarp ? span.length - base : kWarp;
}

// to = (own * rows[at] + sum over entries of weigh(entry, its row) * rows[its row]) / divisor, channel by channel. The
// whole warp must take part, with one row.
template <class T, class Weigh>
__device__ __forceinline__ void weigh_rows(const T* rows, const int* col, Span span, const Attention<T>& a, int64_t at,
                                           Wide<T> own, Wide<T> divisor, const Weigh& weigh, T* to) {
  using W = Wide<T>;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int head = static_cast<int>(at % a.heads);
  for (int first = lane; first - lane < a.width; first += kWarp * kChannels) {
    W sum[kChannels];
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      const int channel = first + c * kWarp;
      // Not 0 * x, which is NaN where x is infinite.
      sum[c] = a.loops && channel < a.width ? own * static_cast<W>(rows[at * a.width + channel]) : W(0);
    }
    for (unsigned base = 0; base < span.length; base += kWarp) {
      int64_t row = 0;
      W weight = 0;
      if (base + lane < span.length) {
        row = static_cast<int64_t>(col[span.begin + base + lane]) * a.heads + head;
        weight = weigh(span.begin + base + lane, row);
      }
      const unsigned count = stretch(span, base);
#pragma unroll 4
      for (unsigned k = 0; k < count; ++k) {
        const W factor = __shfl_sync(kAllLanes, weight, static_cast<int>(k));
        const T* from = rows + __shfl_sync(kAllLanes, row, static_cast<int>(k)) * a.width;
#pragma unroll
        for (int c = 0; c < kChannels; ++c) {
          const int channel = first + c * kWarp;
          sum[c] += channel < a.width ? factor * static_cast<W>(from[channel]) : W(0);
        }
      }
    }
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      const int channel = first + c * kWarp;
      if (channel < a.width) {
        to[at * a.width + channel] = static_cast<T>(sum[c] / divisor);
      }
    }
  }
}

// <own[at], rows[row of entry base + lane]> over a head's channels, 0 behind the last entry. The whole warp must take
// part, with one row.
template <class T>
__device__ __forceinline__ Wide<T> entry_dot(const T* own, const T* rows, const int* col, Span span, unsigned base,
                                             const Attention<T>& a, int64_t at) {
  using W = Wide<T>;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int head = static_cast<int>(at % a.heads);
  const unsigned count = stretch(span, base);
  W kept = 0;
  for (unsigned first = 0; first < count; first += kUnroll) {
    W dot[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      dot[u] = 0;
      if (first + u < count) {
        const int64_t row = static_cast<int64_t>(col[span.begin + base + first + u]) * a.heads + head;
        for (int channel = lane; channel < a.width; channel += kWarp) {
          dot[u] += static_cast<W>(own[at * a.width + channel]) * static_cast<W>(rows[row * a.width + channel]);
        }
      }
    }
    group_sum(dot, kWarp);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      kept = first + u == static_cast<unsigned>(lane) ? dot[u] : kept;
    }
  }
  return kept;
}

template <class T>
struct Forward : Attention<T> {
  T* out;
  Wide<T>* highest;
  Wide<T>* total;
};

template <class T>
__global__ void __launch_bounds__(kThreads, 2) forward_kernel(Forward<T> a) {
  using W = Wide<T>;
  constexpr W kNone = -static_cast<W>(INFINITY);
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (at >= a.nodes * a.heads) {
    return;
  }
  const int head = static_cast<int>(at % a.heads);
  const Span span = row_span(a.rowptr, at / a.heads);
  const auto sender = [&](unsigned k) { return static_cast<int64_t>(a.entries.col[span.begin + k]) * a.heads + head; };
  const W own_score = a.score(at, at);
  W present = a.loops ? own_score : kNone;
  W any = present;
  for (unsigned k = lane; k < span.length; k += kWarp) {
    const W score = a.score(at, sender(k));
    any = score > any ? score : any;
    present = a.entries.template value_of<false>(span.begin + k) != 0 && score > present ? score : present;
  }
  present = warp_max(present), any = warp_max(any);
  const W highest = present != kNone ? present : any != kNone ? any : W(0);
  const auto weigh = [&](int64_t entry, int64_t from) {
    return a.entries.template value_of<false>(entry) * share(a.score(at, from), highest);
  };
  const W own = a.loops ? share(own_score, highest) : W(0);
  W total = 0;
  for (unsigned k = lane; k < span.length; k += kWarp) {
    total += weigh(span.begin + k, sender(k));
  }
  total = group_sum(total, kWarp) + own;
  // Where nothing is, an edge of weight 1 would have all the attention: its slope there is that step.
  total = total == 0 ? W(1) : total;
  if (lane == 0) {
    a.highest[at] = highest;
    a.total[at] = total;
  }
  weigh_rows<T>(a.sent, a.entries.col, span, a, at, own, total, weigh, a.out);
}

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

void check_scores(const Tensor& sent, const Tensor& source, const Tensor& target) {
  STD_TORCH_CHECK(source.dim() == 2 && source.size(0) == sent.size(0) && source.scalar_type() == sent.scalar_type() &&
                      source.get_device_index() == sent.get_device_index(),
                  "source: expected heads of every node, in dtype and on the device of sent");
  STD_TORCH_CHECK(source.size(1) >= 1 && sent.size(1) % source.size(1) == 0,
                  "source: expected a number of heads that divides ", sent.size(1), ", got ", source.size(1));
  check_like_x(target, source, "target");
}

template <class T>
Attention<T> attention_arguments(const Tensor& sent, const Tensor& source, const Tensor& target, const Tensor& value,
                                 const Tensor& rowptr, const Tensor& col, double negative_slope, bool loops) {
  Attention<T> a{};
  a.nodes = sent.size(0);
  a.heads = static_cast<int>(source.size(1));
  a.width = static_cast<int>(sent.size(1) / source.size(1));
  a.sent = read<T>(sent);
  a.source = read<T>(source);
  a.target = read<T>(target);
  a.rowptr = read<int>(rowptr);
  a.entries = {read<int>(col), read<T>(value), nullptr};
  a.slope = static_cast<Wide<T>>(negative_slope);
  a.loops = loops;
  return a;
}

std::tuple<Tensor, Tensor, Tensor> gat_propagate(Tensor sent, Tensor source, Tensor target, Tensor value, Tensor rowptr,
                                                 Tensor col, OptionalTensor /*t_rowptr*/, OptionalTensor /*t_col*/,
                                                 OptionalTensor /*t_edge*/, double negative_slope,
                                                 bool add_self_loops) {
  check_operands(sent, value, rowptr, col);
  check_scores(sent, source, target);
  const DeviceScope device(sent);
  sent = dense(sent), source = dense(source), target = dense(target);
  value = dense(value), rowptr = dense(rowptr), col = dense(col);
  return dispatch_storage(sent, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const Tensor out = empty(sent, {sent.size(0), sent.size(1)}, sent.scalar_type());
    const Tensor highest = empty(sent, {source.size(0), source.size(1)}, kWideType<T>);
    const Tensor total = empty(sent, {source.size(0), source.size(1)}, kWideType<T>);
    const Forward<T> a{attention_arguments<T>(sent, source, target, value, rowptr, col, negative_slope, add_self_loops),
                       write<T>(out), write<Wide<T>>(highest), write<Wide<T>>(total)};
    if (a.nodes > 0) {
      launch(device.stream, forward_kernel<T>, ceil_div(a.nodes * a.heads, kWarps), kThreads, 0, a);
    }
    return std::make_tuple(out, highest, total);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gat_propagate_backward(
    Tensor grad_out, Tensor sent, Tensor source, Tensor target, Tensor value, Tensor out, Tensor highest, Tensor total,
    Tensor rowptr, Tensor col, OptionalTensor t_rowptr, OptionalTensor t_col, OptionalTensor t_edge,
    double negative_slope, bool add_self_loops) {
  check_operands(sent, value, rowptr, col);
  check_scores(sent, source, target);
  check_like_x(grad_out, sent, "grad_out");
  check_like_x(out, sent, "out");
  Transpose transpose{t_rowptr, t_col, t_edge};
  transpose.check(rowptr, col.numel());
  const DeviceScope device(sent);
  grad_out = dense(grad_out), sent = dense(sent), source = dense(source), target = dense(target), out = dense(out);
  value = dense(value), rowptr = dense(rowptr), col = dense(col), highest = dense(highest), total = dense(total);
  return dispatch_storage(sent, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using W = Wide<T>;
    for (const Tensor* saved : {&highest, &total}) {
      STD_TORCH_CHECK(saved->scalar_type() == kWideType<T> && saved->numel() == source.numel(),
                      "highest, total: expected one accumulation value per node and head");
    }
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
  m.impl("gat_propagate", TORCH_BOX(&acgkd_fast::cuda::gat_propagate));
  m.impl("gat_propagate_backward", TORCH_BOX(&acgkd_fast::cuda::gat_propagate_backward));
}
