// Reading the neighbours of a row: spans of CSR rows, the window of a block, degrees, and the sweep over the entries.
#pragma once

#include "lanes.h"

namespace acgkd_fast::cuda {

struct Span {
  int64_t begin = 0;
  unsigned length = 0;
};

__device__ __forceinline__ Span row_span(const int* rowptr, int64_t row) {
  const int begin = rowptr[row];
  return {begin, static_cast<unsigned>(rowptr[row + 1] - begin)};
}

template <class T>
struct Entries {
  const int* col;
  const T* value;
  const int* edge;  // of a transpose: position of each entry's value; else entry e has value e

  template <bool kPermuted>
  __device__ __forceinline__ Wide<T> value_of(int64_t entry) const {
    return static_cast<Wide<T>>(value[kPermuted ? edge[entry] : entry]);
  }
};

// Feature rows first, first + 1, ... with the factor of each row, in global or in shared memory.
template <class T>
struct Source {
  const T* rows;
  int first_row;
  const Wide<T>* scale;  // null: every factor is 1
  int first_scale;
  int width;

  // Of node -1, which stands for no entry: an address that must not be read, and the factor 0.
  __device__ __forceinline__ const T* row(int node) const {
    return rows + static_cast<int64_t>(node - first_row) * width;
  }
  __device__ __forceinline__ Wide<T> factor(int node) const {
    Wide<T> found = node < 0 ? Wide<T>(0) : Wide<T>(1);
    if (node >= 0 && scale != nullptr) {
      found = scale[node - first_scale];
    }
    return found;
  }
};

// What becomes of the dot products of a row's entries. Entry k belongs to lane k % lanes; the first `held` entries stay
// in a register of that lane, the others go to memory, which only that lane touches.
template <class T>
struct Dots {
  Wide<T>* memory;
  unsigned held;
  bool fresh;  // nothing is in memory yet
  Wide<T> kept;

  __device__ __forceinline__ void add(unsigned entry, unsigned length, unsigned lane, unsigned lanes, Wide<T> dot) {
    if (entry >= length || (entry & (lanes - 1)) != lane) {
      return;
    }
    if (entry < held) {
      kept += dot;
    } else {
      memory[entry] = fresh ? dot : memory[entry] + dot;
    }
  }
};

// Visits entries start, start + 1, .. of each stretch of `step` entries, kUnroll of them per trip, and accumulates
// factor * features (kSum, with the entry's value) and <factor * features, own> (kDot).
// With kDot the lanes of a warp exchange sums, so `trips` must be the same for all of them.
template <bool kSum, bool kDot, bool kPermuted, class T, bool kVector>
__device__ __forceinline__ void sweep(const Lane<T, kVector>& at, int feature, const Source<T>& source,
                                      const Entries<T>& entries, Span span, unsigned start, unsigned step,
                                      unsigned trips, const Share<T, kVector>& own, Share<T, kVector>& sum,
                                      Dots<T>& dots) {
  using W = Wide<T>;
  constexpr int K = kElements<T, kVector>;
  for (unsigned trip = 0; trip < trips; ++trip) {
    const unsigned base = start + trip * step;
    // Load by load rather than entry by entry, and without branches: all columns must be under way before the first
    // one is waited for, and likewise all features.
    int node[kUnroll];
    W factor[kUnroll], value[kUnroll];
    Share<T, kVector> near[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      node[u] = base + u < span.length ? entries.col[span.begin + base + u] : -1;
    }
    if constexpr (kSum) {
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        value[u] = base + u < span.length ? entries.template value_of<kPermuted>(span.begin + base + u) : W(0);
      }
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      factor[u] = source.factor(node[u]);
      at.load(source.row(node[u]), node[u] < 0 ? at.width : feature, near[u]);
    }
    if constexpr (kSum) {
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const W weight = value[u] * factor[u];
#pragma unroll
        for (int c = 0; c < K; ++c) {
          sum[c] += weight * near[u][c];
        }
      }
    }
    if constexpr (kDot) {
      W dot[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        dot[u] = W(0);
#pragma unroll
        for (int c = 0; c < K; ++c) {
          dot[u] += near[u][c] * own[c];
        }
        dot[u] *= factor[u];
      }
      // `base` is a multiple of kUnroll, so in a wide group entry base + u belongs to a lane that received sum u.
      if (at.lanes >= kUnroll) {
        const W sum_of_one = transposed_group_sum(dot, at.lane, at.lanes);
        dots.add(base + at.lane % kUnroll, span.length, at.lane, at.lanes, sum_of_one);
      } else {
        group_sum(dot, at.lanes);
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
          dots.add(base + u, span.length, at.lane, at.lanes, dot[u]);
        }
      }
    }
  }
}

constexpr int kDegreeLanes = 8;

// 1 / sqrt(degree) of `count` rows from `first` on, into to[0 .. count). Groups of kDegreeLanes take short rows, the
// block takes long ones. The order of additions depends on the row alone, so blocks that share a row get equal bits.
// The whole block must take part; `to` is complete on return.
template <class T>
__device__ void inverse_root_degrees(const int* rowptr, const T* value, bool self_loops, int64_t first, int count,
                                     unsigned long_row, Wide<T>* to, Wide<T>* partial) {
  using W = Wide<T>;
  constexpr int kLanes = kDegreeLanes;
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  const int group = static_cast<int>(threadIdx.x) / kLanes;
  const W loop = self_loops ? W(1) : W(0);
  const auto finish = [loop](W sum) {
    const W degree = sum + loop;
    return degree > W(0) ? W(1) / sqrt(degree) : W(0);
  };
  bool has_long = false;
  for (int base = 0; base < count; base += kThreads / kLanes) {
    const int row = base + group;
    const Span span = row < count ? row_span(rowptr, first + row) : Span{};
    const bool here = row < count && span.length <= long_row;
    has_long |= span.length > long_row;
    W sum = 0;
    if (here) {
#pragma unroll 4
      for (unsigned k = lane; k < span.length; k += kLanes) {
        sum += static_cast<W>(value[span.begin + k]);
      }
    }
    sum = group_sum(sum, kLanes);
    if (here && lane == 0) {
      to[row] = finish(sum);
    }
  }
  if (!__syncthreads_or(has_long)) {
    return;
  }
  for (int row = 0; row < count; ++row) {
    const Span span = row_span(rowptr, first + row);
    if (span.length <= long_row) {
      continue;
    }
    W sum = 0;
#pragma unroll 4
    for (unsigned k = threadIdx.x; k < span.length; k += kThreads) {
      sum += static_cast<W>(value[span.begin + k]);
    }
    sum = group_sum(sum, kWarp);
    if (threadIdx.x % kWarp == 0) {
      partial[threadIdx.x / kWarp] = sum;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      for (int warp = 1; warp < kWarps; ++warp) {
        sum += partial[warp];
      }
      to[row] = finish(sum);
    }
    __syncthreads();
  }
}

struct Window {
  int first = 0;
  int count = 0;
};

// Smallest and largest of a number that every thread brings. `scratch` holds 2 * kWarps ints.
__device__ inline Window block_range(int low, int high, int* scratch) {
  low = __reduce_min_sync(kAllLanes, low);
  high = __reduce_max_sync(kAllLanes, high);
  if (threadIdx.x % kWarp == 0) {
    scratch[threadIdx.x / kWarp] = low;
    scratch[kWarps + threadIdx.x / kWarp] = high;
  }
  __syncthreads();
  for (int warp = 0; warp < kWarps; ++warp) {
    low = min(low, scratch[warp]);
    high = max(high, scratch[kWarps + warp]);
  }
  __syncthreads();
  return {low, high - low + 1};
}

// The nodes that `rows` rows from `first` on and their neighbours lie in. Kernels are not told where graphs begin; in a
// batch of small graphs the window is the graphs that the block touches. Columns ascend in each row, so the ends of
// the rows give the range up to a promise; a window of at most `limit` of the `nodes` is confirmed by every entry.
__device__ inline Window find_window(const int* rowptr, const int* col, int64_t first, int rows, int limit,
                                     int64_t nodes, int* scratch) {
  int low = static_cast<int>(first), high = static_cast<int>(first) + rows - 1;
  if (limit < nodes) {
    for (int r = static_cast<int>(threadIdx.x); r < rows; r += kThreads) {
      const Span span = row_span(rowptr, first + r);
      if (span.length > 0) {
        const int begin = col[span.begin], end = col[span.begin + span.length - 1];
        low = min(low, min(begin, end));
        high = max(high, max(begin, end));
      }
    }
    const Window promised = block_range(low, high, scratch);
    if (promised.count > limit) {
      return promised;
    }
  }
  for (int64_t e = rowptr[first] + static_cast<int64_t>(threadIdx.x); e < rowptr[first + rows]; e += kThreads) {
    low = min(low, col[e]);
    high = max(high, col[e]);
  }
  return block_range(low, high, scratch);
}

// Copies the features of a window to shared memory if it fits and its rows are read at least twice on average.
// Needs vector rows. The whole block must take part; the copy is complete on return.
template <class T>
__device__ bool stage(const T* rows, const Plan& plan, Window window, int64_t entries, T* staged) {
  if (window.count > plan.staged_rows || entries < 2 * static_cast<int64_t>(window.count)) {
    return false;
  }
  const uint4* from = reinterpret_cast<const uint4*>(rows + static_cast<int64_t>(window.first) * plan.width);
  uint4* to = reinterpret_cast<uint4*>(staged);
  const int packs = window.count * (plan.width / kElements<T, true>);
#pragma unroll 4
  for (int i = static_cast<int>(threadIdx.x); i < packs; i += kThreads) {
    to[i] = from[i];
  }
  __syncthreads();
  return true;
}

}  // namespace acgkd_fast::cuda
