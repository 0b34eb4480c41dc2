// The teacher's forward pass over the rows that an edit reaches, and what it does to moment sums and loss.
//
// Every sum runs in the order of csrc/cpu/search_graph.cpp, with a fused multiply-add where the CPU has one.
#pragma once

#include "search_proposal.h"

namespace acgkd_fast::cuda::search {

// Rows that share what they read of W, once there are enough to keep all threads busy.
constexpr int kSharingRows = 2;

__device__ __forceinline__ float4 load4(const float* from) { return *reinterpret_cast<const float4*>(from); }
__device__ __forceinline__ float4 load_weight(const float* from) {
  return __ldg(reinterpret_cast<const float4*>(from));
}
__device__ __forceinline__ void store4(float* to, float4 value) { *reinterpret_cast<float4*>(to) = value; }

__device__ __forceinline__ float4 scaled(float a, float4 x) { return {a * x.x, a * x.y, a * x.z, a * x.w}; }

// a x + y.
__device__ __forceinline__ float4 fused(float a, float4 x, float4 y) {
  return {fmaf(a, x.x, y.x), fmaf(a, x.y, y.y), fmaf(a, x.z, y.z), fmaf(a, x.w, y.w)};
}

__device__ __forceinline__ float4 sum_of(float4 a, float4 b) { return {a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w}; }

__device__ __forceinline__ float4 activated(float4 x, const float* scale, const float* shift) {
  const float4 a = load_weight(scale), b = load_weight(shift);
  float4 y{fmaf(x.x, a.x, b.x), fmaf(x.y, a.y, b.y), fmaf(x.z, a.z, b.z), fmaf(x.w, a.w, b.w)};
  // In this order a NaN stays one.
  y.x = y.x < 0.0f ? 0.0f : y.x;
  y.y = y.y < 0.0f ? 0.0f : y.y;
  y.z = y.z < 0.0f ? 0.0f : y.z;
  y.w = y.w < 0.0f ? 0.0f : y.w;
  return y;
}

// kKeep: the rows of an edit that passed are written where they stay. Else they go to the buffers, because most edits
// are dropped, and the moment sums are compared with the rows that stand.
template <bool kShared, bool kKeep>
struct Pass {
  const Graph<kShared>& g;
  const Network& net;
  const int quads, row_words;
  float *transform, *before_norm, *output, *hidden;

  __device__ explicit Pass(const Graph<kShared>& graph)
      : g(graph), net(graph.net), quads(graph.net.stride / 4), row_words(graph.nodes * graph.net.stride) {
    transform = g.rows;
    before_norm = transform + row_words;
    output = before_norm + row_words;
    hidden = output + row_words;
  }

  __device__ __forceinline__ float* resident(int plane, int node, int quad) const {
    return g.features + plane * row_words + node * net.stride + 4 * quad;
  }
  __device__ __forceinline__ int aggregate_plane(int l) const { return net.depth + l; }
  __device__ __forceinline__ int last_norm_plane(int l) const { return (net.gin ? 2 : 1) * net.depth + l; }
  __device__ __forceinline__ int output_plane() const { return net.planes() - 1; }

  // use(i, quad) for 4 channels of each of `count` rows.
  template <class Use>
  __device__ __forceinline__ void for_quads(int count, Use use) const {
    for (int item = static_cast<int>(threadIdx.x); item < count * quads; item += kEditThreads) {
      const int i = item / quads;
      use(i, item - i * quads);
    }
  }

  // kRows rows of a buffer times W: use(row, quad, in[row] W + b). A row's bits do not depend on the others.
  template <int kRows, class Use>
  __device__ __forceinline__ void multiply_block(const float* in, int first, int count, int quad, const float* weight,
                                                 const float* bias, Use use) const {
    float4 total[kRows];
    const float* x[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      total[r] = bias == nullptr ? float4{0.0f, 0.0f, 0.0f, 0.0f} : load_weight(bias + 4 * quad);
      x[r] = in + min(first + r, count - 1) * net.stride;
    }
    const float* w = weight + 4 * quad;
#pragma unroll(kRows == 1 ? 2 : 1)
    for (int k = 0; k < net.stride; k += 4, w += 4 * net.stride) {
      const float4 w0 = load_weight(w), w1 = load_weight(w + net.stride), w2 = load_weight(w + 2 * net.stride);
      const float4 w3 = load_weight(w + 3 * net.stride);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const float4 here = load4(x[r] + k);
        total[r] = fused(here.w, w3, fused(here.z, w2, fused(here.y, w1, fused(here.x, w0, total[r]))));
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (first + r < count) {
        use(first + r, quad, total[r]);
      }
    }
  }

  template <class Use>
  __device__ __forceinline__ void multiply(const float* in, int count, const float* weight, const float* bias,
                                           Use use) const {
    if (count * quads <= 2 * kEditThreads) {
      for_quads(count, [&](int i, int quad) { multiply_block<1>(in, i, count, quad, weight, bias, use); });
    } else {
      for_quads((count + kSharingRows - 1) / kSharingRows, [&](int i, int quad) {
        multiply_block<kSharingRows>(in, kSharingRows * i, count, quad, weight, bias, use);
      });
    }
  }

  // Of the rows that layer l takes in: row `node` of its Z; the first `ready` marked rows are new.
  __device__ __forceinline__ float4 transformed(int l, int node, int quad, int ready) const {
    if constexpr (!kKeep) {
      const int at = g.place[node];
      if (at < ready) {
        return load4(transform + at * net.stride + 4 * quad);
      }
    }
    return load4(resident(l, node, quad));
  }

  // Output of layer l of a node that no edit reached there.
  __device__ __forceinline__ float4 standing_output(int l, int node, int quad) const {
    float4 h{0.0f, 0.0f, 0.0f, 0.0f};
    for (int m = 0; m <= l; ++m) {
      const Layer layer = net.layer(m);
      const float4 mine =
          activated(load4(resident(last_norm_plane(m), node, quad)), layer.scale + 4 * quad, layer.shift + 4 * quad);
      h = m > 0 ? sum_of(mine, h) : mine;
    }
    return h;
  }

  __device__ __forceinline__ void finish_row(int l, const Layer& layer, int i, int quad, float4 normalised) const {
    float4 h = activated(normalised, layer.scale + 4 * quad, layer.shift + 4 * quad);
    float* to = output + i * net.stride + 4 * quad;
    const int node = g.dirty[i];
    if (l > 0) {
      h = sum_of(h, i < g.count[l] ? load4(to) : standing_output(l - 1, node, quad));
    }
    store4(to, h);
    if (kKeep && l + 1 == net.depth) {
      store4(resident(output_plane(), node, quad), h);
    }
  }

  // Change of the sums of one norm's inputs, in float64, row after row. The last threads take it: the first have more
  // of everything else.
  __device__ __forceinline__ void moments(int norm, int count, const float* fresh, int plane) const {
    const float* old = g.features + plane * row_words;
    for (int item = kEditThreads - 1 - static_cast<int>(threadIdx.x); item < 2 * net.stride; item += kEditThreads) {
      const bool squares = item >= net.stride;
      const int channel = squares ? item - net.stride : item;
      double sum = 0.0;
#pragma unroll 4
      for (int i = 0; i < count; ++i) {
        const double now = fresh[i * net.stride + channel], before = old[g.dirty[i] * net.stride + channel];
        // Squares of floats are exact in double.
        sum += squares ? now * now - before * before : now - before;
      }
      g.change[norm * 2 * net.stride + item] = sum;
    }
  }

  __device__ __forceinline__ void input_rows() const {
    const Layer layer = net.layer(0);
    const int count = g.count[0];
    for_quads(count, [&](int i, int quad) {
      const int node = g.dirty[i];
      float4 z{0.0f, 0.0f, 0.0f, 0.0f};
      if (g.job.rules.num_labels > 1) {
        z = load_weight(layer.weight + g.label[node] * net.stride + 4 * quad);
      } else {
        const float* x = g.job.pool.x + (g.job.pool.ptr[g.graph] + node) * net.features;
        for (int k = 0; k < net.features; ++k) {
          z = fused(__ldg(x + k), load_weight(layer.weight + static_cast<int64_t>(k) * net.stride + 4 * quad), z);
        }
      }
      store4(kKeep ? resident(0, node, quad) : transform + i * net.stride + 4 * quad, z);
    });
    __syncthreads();
  }

  __device__ __forceinline__ void layer_rows(int l) {
    const Layer layer = net.layer(l);
    const int ready = g.count[l], count = g.count[l + 1];
    for_quads(count, [&](int i, int quad) {
      const int node = g.dirty[i];
      const float scale = net.gin ? 1.0f : g.degree_scale[node];
      const float self = net.gin ? __ldg(net.self_weight + l) : scale;
      float4 total = scaled(self, transformed(l, node, quad, ready));
      for (int w = 0; w < g.words; ++w) {
        for (unsigned bits = g.adjacency[node * g.words + w]; bits != 0u; bits &= bits - 1) {
          const int other = 32 * w + __ffs(static_cast<int>(bits)) - 1;
          total = fused(net.gin ? 1.0f : g.degree_scale[other], transformed(l, other, quad, ready), total);
        }
      }
      const float4 a = fused(scale, total, load_weight(layer.bias + 4 * quad));
      store4(kKeep ? resident(aggregate_plane(l), node, quad) : before_norm + i * net.stride + 4 * quad, a);
      if (net.gin) {
        store4(hidden + i * net.stride + 4 * quad,
               activated(a, layer.inner_scale + 4 * quad, layer.inner_shift + 4 * quad));
      } else {
        finish_row(l, layer, i, quad, a);
      }
    });
    __syncthreads();
    const float* normalised = before_norm;
    if (net.gin) {
      if (!kKeep) {
        moments(2 * l, count, before_norm, aggregate_plane(l));
      }
      multiply(hidden, count, layer.second, layer.second_bias, [&](int i, int quad, float4 y) {
        store4(kKeep ? resident(last_norm_plane(l), g.dirty[i], quad) : transform + i * net.stride + 4 * quad, y);
        finish_row(l, layer, i, quad, y);
      });
      __syncthreads();
      // The next Z overwrites A, which has been read, and not Y.
      float* const second = transform;
      transform = before_norm;
      before_norm = second;
      normalised = second;
    }
    if (!kKeep) {
      moments(net.gin ? 2 * l + 1 : l, count, normalised, last_norm_plane(l));
    }
    if (l + 1 < net.depth) {
      multiply(output, count, net.layer(l + 1).weight, nullptr, [&](int i, int quad, float4 z) {
        store4(kKeep ? resident(l + 1, g.dirty[i], quad) : transform + i * net.stride + 4 * quad, z);
      });
      __syncthreads();
    }
  }

  // The last layer's moments may still be under way when this returns.
  __device__ __forceinline__ void run() {
    if (g.count[0] > 0) {
      input_rows();
    }
    for (int l = 0; l < net.depth; ++l) {
      layer_rows(l);
    }
  }

  __device__ __forceinline__ void pool_rows() const {
    const int reached = g.count[net.depth];
    for (int channel = static_cast<int>(threadIdx.x); channel < net.stride; channel += kEditThreads) {
      float pooled = 0.0f;
#pragma unroll 2
      for (int node = 0; node < g.nodes; ++node) {
        const int at = g.place[node];
        const float h = at < reached ? output[at * net.stride + channel]
                                     : g.features[output_plane() * row_words + node * net.stride + channel];
        if (node == 0) {
          pooled = h;
        } else if (net.pooling == kMax) {
          pooled = h <= pooled ? pooled : h;
        } else {
          pooled += h;
        }
      }
      g.pooled[channel] = net.pooling == kMean ? pooled / static_cast<float>(g.nodes) : pooled;
    }
  }

  // Lanes of warp 0: the linearised change of K.
  __device__ __forceinline__ void linearise() const {
    const int lane = static_cast<int>(threadIdx.x);
    double part = 0.0;
    if (lane < kDotParts) {
#pragma unroll 4
      for (int k = lane; k < net.sums(); k += kDotParts) {
        part = fma(__ldg(g.job.slope + k), g.change[k], part);
      }
    }
    part += __shfl_xor_sync(kAllLanes, part, 4);
    part += __shfl_xor_sync(kAllLanes, part, 1);
    part += __shfl_xor_sync(kAllLanes, part, 2);
    if (lane == 0) {
      g.trial->slope_product = part;
    }
  }

  // The other warps: one class each.
  __device__ __forceinline__ void classify() const {
    for (int c = static_cast<int>(threadIdx.x) - kWarp; c < net.classes; c += kEditThreads - kWarp) {
      const float* weight = net.classifier + static_cast<int64_t>(c) * net.width;
      double logit = __ldg(net.bias + c);
#pragma unroll 4
      for (int k = 0; k < net.width; ++k) {
        logit = fma(static_cast<double>(__ldg(weight + k)), static_cast<double>(g.pooled[k]), logit);
      }
      g.logits[c] = logit;
    }
  }

  // Cross-entropy, and whether the largest logit is the label's.
  __device__ __forceinline__ double loss(int& hit) const {
    const int target = static_cast<int>(g.job.pool.y[g.graph]);
    double largest = -HUGE_VAL, sum = 0.0;
    int best = 0;
    for (int c = 0; c < net.classes; ++c) {
      const double logit = g.logits[c];
      if (logit > largest) {
        sum = __dmul_rn(sum, exp(largest - logit)) + 1.0;
        largest = logit;
        best = c;
      } else {
        sum += exp(logit - largest);
      }
    }
    hit = best == target;
    return largest + log(sum) - g.logits[target];
  }
};

}  // namespace acgkd_fast::cuda::search
