// Edits of graphs: one block takes one graph through a round, with the features of all layers in shared memory where
// they fit. Not yet run on a GPU.

#include "search_layers.h"

namespace acgkd_fast::cuda::search {
namespace {

// Three blocks of graphs of 20 nodes and 64 channels share a processor's memory; this leaves them its registers.
constexpr int kBlocksPerProcessor = 3;

__device__ __forceinline__ float* state_of(const Pool& pool, int graph, int side) {
  return pool.state + side * pool.side_words + pool.state_start[graph];
}

__device__ __forceinline__ int64_t* pairs_of(const Pool& pool, int graph, int side) {
  return pool.pairs[side] + graph * pool.capacity;
}

__device__ __forceinline__ void copy_state(const Network& net, int nodes, const float* from, float* to) {
  const int64_t quads = state_words(net, nodes) / 4;
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < quads; i += kThreads) {
    reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<const uint4*>(from)[i];
  }
}

template <class V>
__device__ __forceinline__ void copy(int64_t count, const V* from, V* to) {
  for (int64_t i = threadIdx.x; i < count; i += kThreads) {
    to[i] = from[i];
  }
}

template <bool kShared>
__device__ __forceinline__ void build_graph(const Job& a, int graph, unsigned char* shared) {
  Graph<kShared> g(a, graph, shared, state_of(a.pool, graph, 0));
  Record& record = a.pool.records[graph];
  const int64_t* pairs = pairs_of(a.pool, graph, 0);
  const int edges = record.count[0];
  // A thread per row: adding edges from both ends at once would need atomics.
  for (int node = static_cast<int>(threadIdx.x); node < g.nodes; node += kThreads) {
    unsigned* row = g.adjacency + node * g.words;
    for (int w = 0; w < g.words; ++w) {
      row[w] = 0u;
    }
    for (int e = 0; e < edges; ++e) {
      const int low = static_cast<int>(pairs[e] >> 32), high = static_cast<int>(pairs[e] & 0xffffffff);
      if (low == node || high == node) {
        const int other = low == node ? high : low;
        row[other / 32] |= 1u << (other % 32);
      }
    }
  }
  __syncthreads();
  g.prepare();
  __syncthreads();
  for (int node = static_cast<int>(threadIdx.x); node < g.nodes; node += kThreads) {
    g.dirty[node] = node;
  }
  for (int l = static_cast<int>(threadIdx.x); l <= g.net.depth; l += kThreads) {
    g.count[l] = g.nodes;
  }
  __syncthreads();
  Pass<kShared, true>(g).run();
  __syncthreads();
  if constexpr (kShared) {
    copy_state(g.net, g.nodes, g.features, state_of(a.pool, graph, 0));
  }
}

__global__ void __launch_bounds__(kThreads) build_kernel(Job a, const int64_t* counts, const int64_t* label,
                                                         const double* loss, const bool* hit, const double* sums,
                                                         const int64_t* pairs) {
  ACGKD_FAST_DYNAMIC_SHARED(shared);
  const int graph = static_cast<int>(blockIdx.x);
  const int nodes = static_cast<int>(a.pool.ptr[graph + 1] - a.pool.ptr[graph]);
  const bool fits = shared_bytes(a.net, nodes) <= a.shared_limit;
  copy(a.pool.capacity, pairs + graph * a.pool.capacity, pairs_of(a.pool, graph, 0));
  const int64_t sum_count = 2 * int64_t{a.net.channels()};
  copy(sum_count, sums + graph * sum_count, a.pool.sums[0] + graph * sum_count);
  float* state = fits ? reinterpret_cast<float*>(shared + fixed_bytes(a.net)) : state_of(a.pool, graph, 0);
  int* labels = reinterpret_cast<int*>(state) + label_start(a.net, nodes);
  for (int node = static_cast<int>(threadIdx.x); node < nodes; node += kThreads) {
    labels[node] = static_cast<int>(label[a.pool.ptr[graph] + node]);
  }
  if (threadIdx.x == 0) {
    Record record{};
    record.count[0] = static_cast<int>(counts[graph]);
    record.loss[0] = loss[graph];
    record.hit[0] = hit[graph];
    a.pool.records[graph] = record;
  }
  __syncthreads();
  if (fits) {
    build_graph<true>(a, graph, shared);
  } else {
    build_graph<false>(a, graph, shared);
  }
}

// The change of the energy below which an edit, already carried out, passes.
__device__ __forceinline__ double allowed(const Job& a, int nodes, int edges, const Trial& trial) {
  if (a.temperature == 0.0) {
    return 0.0;
  }
  const double n = nodes, count = edges, pairs = n * (n - 1.0);
  const double chance = 2.0 / (pairs < 1.0 ? 1.0 : pairs);
  double ratio = 0.0;
  if (trial.edit.move == kAdd) {
    ratio = -log(count * chance);
  } else if (trial.edit.move == kDelete) {
    ratio = log((count + 1.0) * chance);
  }
  return (ratio - log(trial.accept_uniform)) * (a.temperature / static_cast<double>(a.pool.graphs));
}

// By thread 0, once sums and logits of the edit are known.
template <bool kShared>
__device__ __forceinline__ void decide(const Graph<kShared>& g, const Pass<kShared, false>& pass) {
  Trial& trial = *g.trial;
  int hit;
  const double loss = pass.loss(hit);
  const double excess_change = g.job.energy.excess(loss) - g.job.energy.excess(trial.loss);
  const double delta = trial.slope_product + excess_change;
  const int edges = trial.count + (trial.edit.move == kAdd) - (trial.edit.move == kDelete);
  // A graph on which the teacher answers NaN compares as not lower.
  trial.passes = delta < allowed(g.job, g.nodes, edges, trial);
  if (trial.passes) {
    ++trial.accepted;
    trial.delta += delta;
    trial.excess_change += excess_change;
    trial.loss = loss;
    trial.hit = hit;
  } else {
    g.carry_out(trial.edit, false);
  }
}

__device__ __forceinline__ void edit_list(const Edit& edit, int64_t* pairs, int& count) {
  const int64_t fresh = static_cast<int64_t>(edit.new_low) << 32 | edit.new_high;
  if (edit.move == kRewire) {
    pairs[edit.slot] = fresh;
  } else if (edit.move == kAdd) {
    pairs[count++] = fresh;
  } else if (edit.move == kDelete) {
    pairs[edit.slot] = pairs[--count];
  }
}

template <bool kShared>
__device__ __forceinline__ void edit_graph(const Job& a, int round, int graph, unsigned char* shared) {
  const Record record = a.pool.records[graph];
  const int before = record.side, after = 1 - before, end = a.rounds.begin[round + 1];
  Graph<kShared> g(a, graph, shared, state_of(a.pool, graph, after));
  double* change = a.pool.change + static_cast<int64_t>(graph) * g.net.sums();
  copy_state(g.net, g.nodes, state_of(a.pool, graph, before), g.features);
  if (threadIdx.x == 0) {
    Trial trial{};
    trial.step = a.rounds.begin[round];
    trial.count = record.count[before];
    trial.loss = record.loss[before];
    trial.hit = record.hit[before];
    *g.trial = trial;
  }
  __syncthreads();
  g.prepare();
  for (;;) {
    __syncthreads();
    const int passed = g.trial->accepted;
    int64_t* const pairs = pairs_of(a.pool, graph, passed ? after : before);
    if (threadIdx.x < kWarp) {
      g.next_edit(end, pairs);
    }
    __syncthreads();
    if (!g.trial->edit.valid) {
      break;
    }
    Pass<kShared, false> pass(g);
    pass.run();
    pass.pool_rows();
    __syncthreads();
    if (threadIdx.x < kWarp) {
      pass.linearise();
    } else {
      pass.classify();
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      decide(g, pass);
    }
    __syncthreads();
    if (!g.trial->passes) {
      continue;
    }
    Pass<kShared, true>(g).run();
    for (int k = static_cast<int>(threadIdx.x); k < g.net.sums(); k += kThreads) {
      change[k] = passed ? change[k] + g.change[k] : g.change[k];
    }
    int64_t* const list = pairs_of(a.pool, graph, after);
    if (!passed) {
      copy(g.trial->count, pairs, list);
      __syncthreads();
    }
    if (threadIdx.x == 0) {
      edit_list(g.trial->edit, list, g.trial->count);
    }
  }
  const Trial& trial = *g.trial;
  if (trial.accepted) {
    if constexpr (kShared) {
      copy_state(g.net, g.nodes, g.features, state_of(a.pool, graph, after));
    }
    const int channels = a.net.channels(), width = a.net.width;
    const int64_t first = 2 * static_cast<int64_t>(graph) * channels;
    for (int k = static_cast<int>(threadIdx.x); k < 2 * channels; k += kThreads) {
      const int order = k / channels, channel = k % channels;
      const int at = (2 * (channel / width) + order) * a.net.stride + channel % width;
      a.pool.sums[after][first + k] = a.pool.sums[before][first + k] + change[at];
    }
  }
  if (threadIdx.x == 0) {
    Record& to = a.pool.records[graph];
    to.accepted = trial.accepted;
    to.count[after] = trial.count;
    to.loss[after] = trial.loss;
    to.hit[after] = trial.hit;
    to.delta = trial.delta;
    to.excess_change = trial.excess_change;
  }
}

__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor) edit_kernel(Job a, int round) {
  ACGKD_FAST_DYNAMIC_SHARED(shared);
  if (*a.stopped || static_cast<int>(blockIdx.x) >= a.rounds.count[round]) {
    return;
  }
  const int graph = a.rounds.list[static_cast<int64_t>(round) * a.pool.graphs + blockIdx.x];
  const int nodes = static_cast<int>(a.pool.ptr[graph + 1] - a.pool.ptr[graph]);
  if (shared_bytes(a.net, nodes) <= a.shared_limit) {
    edit_graph<true>(a, round, graph, shared);
  } else {
    edit_graph<false>(a, round, graph, shared);
  }
}

// The copy that counts goes to the operator's results, of which the first copies of pairs and sums are two.
__global__ void __launch_bounds__(kThreads) finish_kernel(Job a, int64_t* counts, int64_t* label, double* loss,
                                                          bool* hit) {
  const int graph = static_cast<int>(blockIdx.x);
  const Record& record = a.pool.records[graph];
  const int side = record.side, nodes = static_cast<int>(a.pool.ptr[graph + 1] - a.pool.ptr[graph]);
  const float* state = state_of(a.pool, graph, side);
  const int* labels = reinterpret_cast<const int*>(state) + label_start(a.net, nodes);
  for (int node = static_cast<int>(threadIdx.x); label != nullptr && node < nodes; node += kThreads) {
    label[a.pool.ptr[graph] + node] = labels[node];
  }
  if (threadIdx.x == 0) {
    counts[graph] = record.count[side];
    loss[graph] = record.loss[side];
    hit[graph] = record.hit[side] != 0;
  }
  if (side == 1) {
    const int64_t sums = 2 * int64_t{a.net.channels()};
    copy(record.count[1], pairs_of(a.pool, graph, 1), pairs_of(a.pool, graph, 0));
    copy(sums, a.pool.sums[1] + graph * sums, a.pool.sums[0] + graph * sums);
  }
}

}  // namespace

void launch_build(cudaStream_t stream, const Job& job, const int64_t* counts, const int64_t* label, const double* loss,
                  const bool* hit, const double* sums, const int64_t* pairs) {
  launch(stream, build_kernel, job.pool.graphs, kThreads, static_cast<size_t>(job.shared_limit), job, counts, label,
         loss, hit, sums, pairs);
}

void launch_edit(cudaStream_t stream, const Job& job, int round, int64_t blocks) {
  launch(stream, edit_kernel, blocks, kThreads, static_cast<size_t>(job.shared_limit), job, round);
}

void launch_finish(cudaStream_t stream, const Job& job, int64_t* counts, int64_t* label, double* loss, bool* hit) {
  launch(stream, finish_kernel, job.pool.graphs, kThreads, 0, job, counts, label, loss, hit);
}

}  // namespace acgkd_fast::cuda::search
