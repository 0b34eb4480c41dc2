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
#pragma once

#include <cmath>

#include "propagate.h"

namespace acgkd_fast::cuda {

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

// Scores of absent edges may lie above the largest of those that are there; beyond this e^x is of no use.
constexpr float kSteepest = 30;

// e^(score - highest).
template <class W>
__device__ __forceinline__ W share(W score, W highest) {
  const W shifted = score - highest;
  return static_cast<W>(exp(shifted > W(kSteepest) ? W(kSteepest) : shifted));
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

inline void check_scores(const Tensor& sent, const Tensor& source, const Tensor& target) {
  STD_TORCH_CHECK(source.dim() == 2 && source.size(0) == sent.size(0) && source.scalar_type() == sent.scalar_type() &&
                      source.get_device_index() == sent.get_device_index(),
                  "source: expected heads of every node, in dtype and on the device of sent");
  STD_TORCH_CHECK(source.size(1) >= 1 && sent.size(1) % source.size(1) == 0,
                  "source: expected a number of heads that divides ", sent.size(1), ", got ", source.size(1));
  check_like(target, source, "target", "source");
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

}  // namespace acgkd_fast::cuda
