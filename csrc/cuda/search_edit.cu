// Edits of graphs: one block takes one graph through a round, with the features of all layers in shared memory where
// they fit. Not yet run on a GPU.

#include "search_layers.h"

namespace acgkd_fast::cuda::search {
namespace {

__device__ __forceinline__ float* state_of(const Pool& pool, int graph, int side) {
  return pool.state + side * pool.side_words + pool.state_start[graph];
}

__device__ __forceinline__ int64_t* pairs_of(const Pool& pool, int graph, int side) {
  return pool.pairs[side] + graph * pool.capacity;
}

__device__ __forceinline__ void copy_state(const Network& net, int nodes, const float* from, float* to) {
  const int64_t quads = state_words(net, nodes) / 4;
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < quads; i += kEditThreads) {
    reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<const uint4*>(from)[i];
  }
}

template <class V>
__device__ __forceinline__ void copy(int64_t count, const V* from, V* to) {
  for (int64_t i = threadIdx.x; i < count; i += kEditThreads) {
    to[i] = from[i];
  }
}

// Graphs that fit shared memory and those that do not are served by kernels of their own, as the latter need more
// registers.
template <bool kShared>
__device__ __forceinline__ bool serves(const Job& a, int graph) {
  const int64_t nodes = a.pool.ptr[graph + 1] - a.pool.ptr[graph];
  return (shared_bytes(a.net, nodes) <= a.shared_limit) == kShared;
}

struct Start {
  const int64_t *counts, *label, *pairs;
  const double *loss, *sums;
  const bool* hit;
};

template <bool kShared>
__global__ void __launch_bounds__(kEditThreads, 2) build_kernel(Job a, Start from) {
  ACGKD_FAST_DYNAMIC_SHARED(shared);
  const int graph = static_cast<int>(blockIdx.x);
  if (!serves<kShared>(a, graph)) {
    return;
  }
  Graph<kShared> g(a, graph, shared, state_of(a.pool, graph, 0));
  const int64_t sums = 2 * int64_t{a.net.channels()};
  const int64_t* pairs = from.pairs + graph * a.pool.capacity;
  const int edges = static_cast<int>(from.counts[graph]);
  copy(a.pool.capacity, pairs, pairs_of(a.pool, graph, 0));
  copy(sums, from.sums + graph * sums, a.pool.sums[0] + graph * sums);
  if (threadIdx.x == 0) {
    Record record{};
    record.count[0] = edges;
    record.loss[0] = from.loss[graph];
    record.hit[0] = from.hit[graph];
    a.pool.records[graph] = record;
  }
  // A thread per row: adding edges from both ends at once would need atomics.
  for (int node = static_cast<int>(threadIdx.x); node < g.nodes; node += kEditThreads) {
    g.label[node] = static_cast<int>(from.label[a.pool.ptr[graph] + node]);
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
  for (int node = static_cast<int>(threadIdx.x); node < g.nodes; node += kEditThreads) {
    g.dirty[node] = node;
  }
  for (int l = static_cast<int>(threadIdx.x); l <= g.net.depth; l += kEditThreads) {
    g.count[l] = g.nodes;
  }
  __syncthreads();
  Pass<kShared, true>(g).run();
  __syncthreads();
  if constexpr (kShared) {
    copy_state(g.net, g.nodes, g.features, state_of(a.pool, graph, 0));
  }
}

// By thread 0, once sums and logits of the edit are known.
template <bool kShared>
__device__ __forceinline__ void decide(const Graph<kShared>& g, const Pass<kShared, false>& pass) {
  Trial& trial = *g.trial;
  const Job& a = g.job;
  int hit;
  const double loss = pass.loss(hit);
  const double excess_change = a.energy.excess(loss) - a.energy.excess(trial.loss);
  const double delta = trial.slope_product + excess_change;
  double allowed = 0.0;
  if (a.temperature > 0.0) {
    allowed = (trial.log_ratio - log(trial.accept_uniform)) * (a.temperature / static_cast<double>(a.pool.graphs));
  }
  // A graph on which the teacher answers NaN compares as not lower.
  const bool best = delta < trial.best_delta, last = trial.candidate == a.rules.proposals;
  const bool settled = trial.retried || (last && best);
  trial.passes = settled && delta < allowed;
  if (settled) {
    trial.best_delta = HUGE_VAL;
  } else if (best) {
    trial.best_delta = delta;
    trial.best = trial.edit;
  }
  if (!trial.passes) {
    g.carry_out(trial.edit, false);
    return;
  }
  ++trial.accepted;
  trial.delta += delta;
  trial.excess_change += excess_change;
  trial.loss = loss;
  trial.hit = hit;
}

__device__ __forceinline__ void edit_list(const Edit& edit, int64_t* pairs, int& count) {
  if (edit.move == kDelete) {
    pairs[edit.slot[0]] = pairs[--count];
    return;
  }
  for (int k = 0; k < edit.num_fresh; ++k) {
    pairs[edit.slot[k]] = static_cast<int64_t>(edit.fresh[k].low) << 32 | edit.fresh[k].high;
  }
  count += edit.move == kAdd;
}

template <bool kShared, bool kPlain>
__global__ void __launch_bounds__(kEditThreads, kShared && kPlain ? 3 : 2) edit_kernel(Job a, int round) {
  ACGKD_FAST_DYNAMIC_SHARED(shared);
  if (*a.stopped || static_cast<int>(blockIdx.x) >= a.rounds.count[round]) {
    return;
  }
  const int graph = a.rounds.list[static_cast<int64_t>(round) * a.pool.graphs + blockIdx.x];
  if (!serves<kShared>(a, graph)) {
    return;
  }
  const Record& record = a.pool.records[graph];
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
    trial.best_delta = HUGE_VAL;
    *g.trial = trial;
  }
  __syncthreads();
  g.prepare();
  for (;;) {
    __syncthreads();
    const int passed = g.trial->accepted;
    int64_t* const pairs = pairs_of(a.pool, graph, passed ? after : before);
    if (threadIdx.x < kWarp) {
      Proposer<kShared, kPlain>(g).next_edit(end, pairs);
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
    for (int k = static_cast<int>(threadIdx.x); k < g.net.sums(); k += kEditThreads) {
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
    for (int k = static_cast<int>(threadIdx.x); k < 2 * channels; k += kEditThreads) {
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

// The copy that counts goes to the operator's results, of which the first copies of pairs and sums are two.
__global__ void __launch_bounds__(kEditThreads, 2) finish_kernel(Job a, int64_t* counts, int64_t* label, double* loss,
                                                          bool* hit) {
  const int graph = static_cast<int>(blockIdx.x);
  const Record& record = a.pool.records[graph];
  const int side = record.side, nodes = static_cast<int>(a.pool.ptr[graph + 1] - a.pool.ptr[graph]);
  const float* state = state_of(a.pool, graph, side);
  const int* labels = reinterpret_cast<const int*>(state) + label_start(a.net, nodes);
  for (int node = static_cast<int>(threadIdx.x); label != nullptr && node < nodes; node += kEditThreads) {
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
  const Start from{counts, label, pairs, loss, sums, hit};
  const int64_t fixed = fixed_bytes(job.net);
  if (job.some_fit) {
    launch(stream, build_kernel<true>, job.pool.graphs, kEditThreads, static_cast<size_t>(job.shared_limit), job, from);
  }
  if (job.some_do_not) {
    launch(stream, build_kernel<false>, job.pool.graphs, kEditThreads, static_cast<size_t>(fixed), job, from);
  }
}

void launch_edit(cudaStream_t stream, const Job& job, int round, int64_t blocks) {
  const int64_t fixed = fixed_bytes(job.net);
  const bool plain = job.rules.weight == nullptr && job.rules.two_hop <= 0.0;
  if (job.some_fit) {
    launch(stream, plain ? edit_kernel<true, true> : edit_kernel<true, false>, blocks, kEditThreads,
           static_cast<size_t>(job.shared_limit), job, round);
  }
  if (job.some_do_not) {
    launch(stream, plain ? edit_kernel<false, true> : edit_kernel<false, false>, blocks, kEditThreads,
           static_cast<size_t>(fixed), job, round);
  }
}

void launch_finish(cudaStream_t stream, const Job& job, int64_t* counts, int64_t* label, double* loss, bool* hit) {
  launch(stream, finish_kernel, job.pool.graphs, kEditThreads, 0, job, counts, label, loss, hit);
}

}  // namespace acgkd_fast::cuda::search
