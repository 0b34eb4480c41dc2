// Sum, mean and maximum of the node features of each graph, and their backward pass.
//
// Forward: a block takes a graph, or one of `splits` equal slices of it where there are fewer graphs than processors
// and they are large; slices meet in a second launch. Every sum runs in the same order each time. Backward: a group of
// lanes per node, which looks its graph up in ptr.

#include "propagate.h"

namespace acgkd_fast::cuda {
namespace {

enum Mode : int64_t { kSum = 0, kMean = 1, kMax = 2 };

// The best of a set of nodes: the first that reaches the maximum; NaN beats every number, as in torch.
template <class W>
struct Best {
  W value;
  int node;  // -1: the set is empty

  __device__ __forceinline__ void offer(W other, int other_node) {
    const bool wins = other > value || other != other || (other == value && other_node < node);
    if (other_node >= 0 && (node < 0 || (value == value && wins))) {
      value = other;
      node = other_node;
    }
  }
};

template <class T>
struct Readout {
  Plan plan;
  int64_t graphs;
  int64_t nodes;
  int splits;
  Mode mode;
  const T* x;
  const int64_t* ptr;
  T* out;
  int* argmax;          // kMax
  Wide<T>* slice_value;  // [graphs, splits, width] where splits > 1
  int* slice_node;       // likewise, kMax
};

// Writes the finished value of one graph and feature.
template <class T>
__device__ __forceinline__ void finish(const Readout<T>& a, int64_t graph, int feature, Wide<T> value, int node) {
  const int64_t at = graph * a.plan.width + feature;
  if (a.mode == kMean) {
    const int64_t size = a.ptr[graph + 1] - a.ptr[graph];
    value /= static_cast<Wide<T>>(size > 1 ? size : 1);
  }
  if (a.mode == kMax) {
    // A NaN equals nothing, so no node reaches it: the number of nodes stands for that.
    a.argmax[at] = value != value ? static_cast<int>(a.nodes) : node;
    value = node < 0 ? Wide<T>(0) : value;
  }
  a.out[at] = static_cast<T>(value);
}

template <class T, bool kVector, bool kIsMax>
__global__ void __launch_bounds__(kThreads, 2) readout_kernel(Readout<T> a) {
  using W = Wide<T>;
  constexpr int K = kElements<T, kVector>;
  ACGKD_FAST_DYNAMIC_SHARED(shared);
  W* values = reinterpret_cast<W*>(shared);
  int* nodes = reinterpret_cast<int*>(shared + kPartialBytes<T>);
  const Lane<T, kVector> at(a.plan);
  const int64_t graph = blockIdx.x / static_cast<unsigned>(a.splits);
  const int64_t slice = blockIdx.x % static_cast<unsigned>(a.splits);
  const int64_t begin = a.ptr[graph], size = a.ptr[graph + 1] - begin;
  const int64_t from = begin + size * slice / a.splits, to = begin + size * (slice + 1) / a.splits;

  for (int tile = 0; tile < a.plan.tiles; ++tile) {
    const int feature = at.first_feature(tile);
    Best<W> best[K];
#pragma unroll
    for (int c = 0; c < K; ++c) {
      best[c] = {W(0), -1};
    }
#pragma unroll 4
    for (int64_t node = from + at.group; node < to; node += at.groups) {
      Share<T, kVector> row;
      at.load(a.x + node * a.plan.width, feature, row);
#pragma unroll
      for (int c = 0; c < K; ++c) {
        if constexpr (kIsMax) {
          best[c].offer(row[c], static_cast<int>(node));
        } else {
          best[c].value += row[c];
        }
      }
    }
#pragma unroll
    for (int c = 0; c < K; ++c) {
      const int slot = c * kThreads + static_cast<int>(threadIdx.x);
      values[slot] = best[c].value;
      if constexpr (kIsMax) {
        nodes[slot] = best[c].node;
      }
    }
    __syncthreads();
    if (at.group == 0) {
      for (int other = 1; other < at.groups; ++other) {
#pragma unroll
        for (int c = 0; c < K; ++c) {
          const int slot = c * kThreads + other * at.lanes + at.lane;
          if constexpr (kIsMax) {
            best[c].offer(values[slot], nodes[slot]);
          } else {
            best[c].value += values[slot];
          }
        }
      }
#pragma unroll
      for (int c = 0; c < K; ++c) {
        const int f = feature + (kVector ? c : c * at.lanes);
        if (f >= a.plan.width) {
          continue;
        }
        if (a.splits == 1) {
          finish(a, graph, f, best[c].value, best[c].node);
          continue;
        }
        const int64_t slot = static_cast<int64_t>(blockIdx.x) * a.plan.width + f;
        a.slice_value[slot] = best[c].value;
        if constexpr (kIsMax) {
          a.slice_node[slot] = best[c].node;
        }
      }
    }
    __syncthreads();
  }
}

// One thread per graph and feature goes through the slices.
template <class T, bool kIsMax>
__global__ void __launch_bounds__(kThreads) slices_kernel(Readout<T> a) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= a.graphs * a.plan.width) {
    return;
  }
  const int64_t graph = index / a.plan.width;
  const int feature = static_cast<int>(index % a.plan.width);
  Best<Wide<T>> best{Wide<T>(0), -1};
  for (int slice = 0; slice < a.splits; ++slice) {
    const int64_t slot = (graph * a.splits + slice) * a.plan.width + feature;
    if constexpr (kIsMax) {
      best.offer(a.slice_value[slot], a.slice_node[slot]);
    } else {
      best.value += a.slice_value[slot];
    }
  }
  finish(a, graph, feature, best.value, best.node);
}

// Enough slices to give every processor a few blocks, but at least two rows per group of lanes; one where graphs are
// small enough that a second launch costs more.
int count_splits(int64_t graphs, int64_t nodes, const Plan& plan, int processors) {
  const int64_t groups = kThreads >> plan.lanes_log2;
  const int64_t mean_size = nodes / graphs;
  if (mean_size <= 8 * groups) {
    return 1;
  }
  const int64_t wanted = ceil_div(int64_t{4} * processors, graphs);
  return static_cast<int>(std::min(wanted, mean_size / (2 * groups)));
}

void check_ptr(const Tensor& x, const Tensor& ptr) {
  check_matrix(x);
  STD_TORCH_CHECK(ptr.scalar_type() == ScalarType::Long && ptr.dim() == 1 && ptr.numel() > 0,
                  "ptr: expected int64 [B + 1]");
  STD_TORCH_CHECK(ptr.get_device_index() == x.get_device_index(), "ptr: expected the device of the features");
}

std::tuple<Tensor, Tensor> readout(Tensor x, Tensor ptr, int64_t mode) {
  check_ptr(x, ptr);
  const DeviceScope device(x);
  x = dense(x), ptr = dense(ptr);
  return dispatch_storage(x, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const int64_t graphs = ptr.numel() - 1, width = x.size(1);
    const bool is_max = mode == kMax;
    const Tensor out = empty(x, {graphs, width}, x.scalar_type());
    const Tensor argmax = empty(x, {is_max ? graphs : 0, width}, ScalarType::Int);
    if (graphs == 0 || width == 0) {
      return std::make_tuple(out, argmax);
    }
    Readout<T> a{};
    const int processors = multiprocessors();
    a.plan = make_plan<T>(x.size(0), 0, width, aligned16({read<T>(x)}), processors, false, false);
    a.graphs = graphs;
    a.nodes = x.size(0);
    a.splits = count_splits(graphs, x.size(0), a.plan, processors);
    a.mode = static_cast<Mode>(mode);
    a.x = read<T>(x);
    a.ptr = read<int64_t>(ptr);
    a.out = write<T>(out);
    a.argmax = write<int>(argmax);
    const bool sliced = a.splits > 1;
    const Tensor slice_value = empty(x, {sliced ? graphs * a.splits : 0, width}, kWideType<T>);
    const Tensor slice_node = empty(x, {sliced && is_max ? graphs * a.splits : 0, width}, ScalarType::Int);
    a.slice_value = write<Wide<T>>(slice_value);
    a.slice_node = write<int>(slice_node);
    const size_t shared = kPartialBytes<T> + (is_max ? kThreads * kElements<T, true> * sizeof(int) : 0);
    with_flags(a.plan.vector, is_max, [&](auto vector, auto maximum) {
      launch(device.stream, readout_kernel<T, vector.value, maximum.value>, graphs * a.splits, kThreads, shared, a);
    });
    if (sliced) {
      launch(device.stream, is_max ? slices_kernel<T, true> : slices_kernel<T, false>,
             ceil_div(graphs * width, kThreads), kThreads, 0, a);
    }
    return std::make_tuple(out, argmax);
  });
}

template <class T>
struct ReadoutBackward {
  Plan plan;
  int64_t graphs;
  int64_t nodes;
  Mode mode;
  const T* grad_out;
  const int* argmax;  // kMax
  const int64_t* ptr;
  T* grad_x;
};

template <class T, bool kVector>
__global__ void __launch_bounds__(kThreads, 2) readout_backward_kernel(ReadoutBackward<T> a) {
  using W = Wide<T>;
  const Lane<T, kVector> at(a.plan);
  const int64_t node = static_cast<int64_t>(blockIdx.x) * at.groups + at.group;
  if (node >= a.nodes) {
    return;
  }
  // The last graph that begins at or before the node; empty graphs begin where the next one does.
  int64_t graph = 0;
  for (int64_t end = a.graphs; end - graph > 1;) {
    const int64_t middle = (graph + end) / 2;
    (a.ptr[middle] <= node ? graph : end) = middle;
  }
  const int64_t size = a.ptr[graph + 1] - a.ptr[graph];
  for (int tile = 0; tile < a.plan.tiles; ++tile) {
    const int feature = at.first_feature(tile);
    Share<T, kVector> grad;
    at.load(a.grad_out + graph * a.plan.width, feature, grad);
#pragma unroll
    for (int c = 0; c < kElements<T, kVector>; ++c) {
      if (a.mode == kMean) {
        grad[c] /= static_cast<W>(size);
      } else if (a.mode == kMax) {
        const int f = feature + (kVector ? c : c * at.lanes);
        const bool reached = f < a.plan.width && a.argmax[graph * a.plan.width + f] == node;
        grad[c] = reached ? grad[c] : W(0);
      }
    }
    at.store(a.grad_x + node * a.plan.width, feature, grad);
  }
}

Tensor readout_backward(Tensor grad_out, Tensor argmax, Tensor ptr, int64_t mode, int64_t num_nodes) {
  check_ptr(grad_out, ptr);
  STD_TORCH_CHECK(grad_out.size(0) == ptr.numel() - 1, "grad_out: expected one row per graph");
  STD_TORCH_CHECK(num_nodes == 0 || ptr.numel() > 1, "num_nodes: expected 0 without graphs, got ", num_nodes);
  STD_TORCH_CHECK(mode != kMax || (argmax.numel() == grad_out.numel() && argmax.scalar_type() == ScalarType::Int),
                  "argmax: expected int32 in the shape of grad_out");
  const DeviceScope device(grad_out);
  grad_out = dense(grad_out), argmax = dense(argmax), ptr = dense(ptr);
  return dispatch_storage(grad_out, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const int64_t width = grad_out.size(1);
    const Tensor grad_x = empty(grad_out, {num_nodes, width}, grad_out.scalar_type());
    if (num_nodes == 0 || width == 0) {
      return grad_x;
    }
    ReadoutBackward<T> a{};
    const bool aligned = aligned16({read<T>(grad_out), read<T>(grad_x)});
    a.plan = make_plan<T>(num_nodes, 0, width, aligned, multiprocessors(), false, false);
    a.graphs = grad_out.size(0);
    a.nodes = num_nodes;
    a.mode = static_cast<Mode>(mode);
    a.grad_out = read<T>(grad_out);
    a.argmax = read<int>(argmax);
    a.ptr = read<int64_t>(ptr);
    a.grad_x = write<T>(grad_x);
    const int64_t blocks = ceil_div(num_nodes, kThreads >> a.plan.lanes_log2);
    launch(device.stream, a.plan.vector ? readout_backward_kernel<T, true> : readout_backward_kernel<T, false>, blocks,
           kThreads, 0, a);
    return grad_x;
  });
}

}  // namespace
}  // namespace acgkd_fast::cuda

STABLE_TORCH_LIBRARY_IMPL(ACGKD_FAST_NAMESPACE, ACGKD_FAST_DISPATCH_KEY, m) {
  m.impl("readout", TORCH_BOX(&acgkd_fast::cuda::readout));
  m.impl("readout_backward", TORCH_BOX(&acgkd_fast::cuda::readout_backward));
}
