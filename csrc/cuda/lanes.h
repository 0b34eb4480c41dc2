// How threads are dealt to rows and features, and what one thread does with its share of a row.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "runtime.h"

namespace acgkd_fast::cuda {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;
// Neighbours whose features are in flight at once: enough to cover memory latency at half occupancy.
constexpr int kUnroll = 4;
constexpr unsigned kAllLanes = 0xffffffffu;

// Sums are taken in float64 for float64 storage and in float32 for everything narrower.
template <class T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Features per thread and tile: 16 bytes, the widest load there is on every architecture; by single features at most 4,
// as each of their addresses takes registers.
template <class T, bool kVector>
constexpr int kElements = kVector || sizeof(T) >= 4 ? 16 / static_cast<int>(sizeof(T)) : 4;

template <class T, bool kVector>
using Share = Wide<T>[kElements<T, kVector>];

// Geometry of a launch, decided on the host from sizes that the host knows.
struct Plan {
  int width = 0;           // features of a node
  int lanes_log2 = 0;      // a row is served by a group of 2^lanes_log2 consecutive threads of one warp
  int tiles = 1;           // a group covers 2^lanes_log2 * kElements features per tile
  int rows_per_block = 0;  // a multiple of the groups in a block
  unsigned long_row = 0;   // rows with more entries are shared by all groups of the block
  bool vector = false;     // 16-byte loads: rows start at multiples of 16 bytes
  bool fold_degrees = false;
  int staged_rows = 0;     // rows of features that fit the window in shared memory; 0: none are staged
};

constexpr int kMinLongRow = 128;
constexpr int kStagedBytes = 64 * 1024;
constexpr int kMinStagedRows = 64;
// Below this many entries per row a staged row is read about once, so staging cannot pay.
constexpr int kMinStagedDegree = 8;
// Folding makes a block sum the degrees of its neighbours too: at worst every block reads every value.
constexpr int64_t kMaxFoldedReads = int64_t{1} << 21;
constexpr int64_t kMaxFoldedBytes = 16 * 1024;

template <class T>
Plan make_plan(int64_t nodes, int64_t entries, int64_t width, bool aligned, int processors, bool may_stage,
               bool needs_degrees) {
  Plan plan;
  plan.width = static_cast<int>(width);
  plan.vector = aligned && width % kElements<T, true> == 0;
  const int64_t elements = plan.vector ? kElements<T, true> : kElements<T, false>;
  while (plan.lanes_log2 < 5 && (elements << plan.lanes_log2) < width) {
    ++plan.lanes_log2;
  }
  // One tile even without features: the entry gradients must still be written.
  plan.tiles = static_cast<int>(std::max<int64_t>(1, ceil_div(width, elements << plan.lanes_log2)));
  const int groups = kThreads >> plan.lanes_log2;
  const int64_t mean_degree = nodes > 0 ? entries / nodes : 0;
  // In a dense graph every row is long; splitting pays only for rows that stand out.
  plan.long_row = static_cast<unsigned>(std::min<int64_t>(INT32_MAX, std::max<int64_t>(kMinLongRow, 4 * mean_degree)));
  plan.rows_per_block = groups;
  if (may_stage && plan.vector && width > 0 && mean_degree >= kMinStagedDegree) {
    const int64_t fit = kStagedBytes / (width * static_cast<int64_t>(sizeof(T)));
    if (fit >= kMinStagedRows) {
      plan.staged_rows = static_cast<int>(fit);
      // Neighbouring rows share most of their window; take more of them as soon as every processor has work.
      const int64_t repeats = nodes / (int64_t{groups} * processors);
      plan.rows_per_block *= static_cast<int>(std::min<int64_t>(4, std::max<int64_t>(1, repeats)));
    }
  }
  plan.fold_degrees = needs_degrees && nodes * static_cast<int64_t>(sizeof(Wide<T>)) <= kMaxFoldedBytes &&
                      ceil_div(nodes, plan.rows_per_block) * entries <= kMaxFoldedReads;
  return plan;
}

// One thread's place: its group in the block, and its features in a tile. Vector lanes own kElements consecutive
// features; scalar lanes own features that are 2^lanes_log2 apart, so that a load of the group is contiguous.
template <class T, bool kVector>
struct Lane {
  static constexpr int K = kElements<T, kVector>;
  int width, lanes, lane, group, groups;

  __device__ explicit Lane(const Plan& plan)
      : width(plan.width),
        lanes(1 << plan.lanes_log2),
        lane(static_cast<int>(threadIdx.x) & ((1 << plan.lanes_log2) - 1)),
        group(static_cast<int>(threadIdx.x) >> plan.lanes_log2),
        groups(kThreads >> plan.lanes_log2) {}

  __device__ int first_feature(int tile) const { return tile * lanes * K + (kVector ? lane * K : lane); }

  // Features outside the row read as zero.
  __device__ __forceinline__ void load(const T* row, int first, Share<T, kVector>& to) const {
    if constexpr (kVector) {
      T stored[K];
      uint4 bits{0u, 0u, 0u, 0u};
      if (first < width) {
        bits = *reinterpret_cast<const uint4*>(row + first);
      }
      memcpy(stored, &bits, sizeof(bits));
#pragma unroll
      for (int c = 0; c < K; ++c) {
        to[c] = static_cast<Wide<T>>(stored[c]);
      }
    } else {
#pragma unroll
      for (int c = 0; c < K; ++c) {
        const int feature = first + c * lanes;
        to[c] = feature < width ? static_cast<Wide<T>>(row[feature]) : Wide<T>(0);
      }
    }
  }

  __device__ __forceinline__ void store(T* row, int first, const Share<T, kVector>& from) const {
    if constexpr (kVector) {
      T stored[K];
#pragma unroll
      for (int c = 0; c < K; ++c) {
        stored[c] = static_cast<T>(from[c]);
      }
      uint4 bits;
      memcpy(&bits, stored, sizeof(bits));
      if (first < width) {
        *reinterpret_cast<uint4*>(row + first) = bits;
      }
    } else {
#pragma unroll
      for (int c = 0; c < K; ++c) {
        const int feature = first + c * lanes;
        if (feature < width) {
          row[feature] = static_cast<T>(from[c]);
        }
      }
    }
  }
};

// Sum over a group, in every lane of it and in the same order for all. The whole warp must take part.
template <int kCount, class V>
__device__ __forceinline__ void group_sum(V (&value)[kCount], int lanes) {
  for (int offset = lanes >> 1; offset > 0; offset >>= 1) {
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
      value[u] += __shfl_xor_sync(kAllLanes, value[u], offset);
    }
  }
}

template <class V>
__device__ __forceinline__ V group_sum(V value, int lanes) {
  V one[1] = {value};
  group_sum(one, lanes);
  return one[0];
}

// Sums of four values over a group of at least four lanes; lane l receives the sum of value[l % 4]. Lanes hand over
// what the other half will finish, so it takes 3 + log2(lanes / 4) exchanges instead of 4 log2(lanes).
template <class V>
__device__ __forceinline__ V transposed_group_sum(const V (&value)[4], int lane, int lanes) {
  const bool odd = (lane & 1) != 0, high = (lane & 2) != 0;
  const V first = (odd ? value[1] : value[0]) + __shfl_xor_sync(kAllLanes, odd ? value[0] : value[1], 1);
  const V second = (odd ? value[3] : value[2]) + __shfl_xor_sync(kAllLanes, odd ? value[2] : value[3], 1);
  V sum = (high ? second : first) + __shfl_xor_sync(kAllLanes, high ? first : second, 2);
  for (int offset = 4; offset < lanes; offset <<= 1) {
    sum += __shfl_xor_sync(kAllLanes, sum, offset);
  }
  return sum;
}

// Bytes of shared memory in which a block adds up what its groups found; every kernel has it at offset 0.
template <class T>
constexpr int kPartialBytes = kThreads * kElements<T, true> * static_cast<int>(sizeof(Wide<T>));

// Bytes for one factor per node, a multiple of 16 so that staged rows behind them are aligned.
template <class T>
constexpr __host__ __device__ int shared_scale_bytes(int64_t nodes) {
  return static_cast<int>((nodes * static_cast<int64_t>(sizeof(Wide<T>)) + 15) / 16 * 16);
}

// Adds the shares of all groups, group 0 first. Only group 0 receives the sum; the whole block must take part.
template <class T, bool kVector>
__device__ void block_sum(const Lane<T, kVector>& at, Share<T, kVector>& sum, Wide<T>* partial) {
  // Element-major, so that the threads of a warp touch different banks.
#pragma unroll
  for (int c = 0; c < kElements<T, kVector>; ++c) {
    partial[c * kThreads + static_cast<int>(threadIdx.x)] = sum[c];
  }
  __syncthreads();
  if (at.group == 0) {
    for (int other = 1; other < at.groups; ++other) {
#pragma unroll
      for (int c = 0; c < kElements<T, kVector>; ++c) {
        sum[c] += partial[c * kThreads + other * at.lanes + at.lane];
      }
    }
  }
  __syncthreads();
}

}  // namespace acgkd_fast::cuda
