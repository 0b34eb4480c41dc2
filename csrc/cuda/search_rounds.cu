// What happens around the edits: which graphs a round edits, and whether the pool keeps what they did. Not yet run on a
// GPU.

#include "search.h"

namespace acgkd_fast::cuda::search {
namespace {

// How many threads before this one raise the flag, and in `total` how many of the block do.
__device__ __forceinline__ int place_in_block(bool flag, int* partial, int& total) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const unsigned set = __ballot_sync(kAllLanes, flag);
  if (lane == 0) {
    partial[warp] = __popc(set);
  }
  __syncthreads();
  int place = __popc(set & ((1u << lane) - 1u));
  total = 0;
  for (int other = 0; other < kWarps; ++other) {
    place += other < warp ? partial[other] : 0;
    total += partial[other];
  }
  __syncthreads();
  return place;
}

// A block per layer copies its weights, each matrix row padded to `stride`; see Network and search/packing.py.
__global__ void __launch_bounds__(kThreads, 2) pad_kernel(Network net, const float* parameters, float* weights,
                                                       float* self_weight) {
  const int l = static_cast<int>(blockIdx.x);
  const int64_t width = net.width, stride = net.stride;
  const int64_t behind_bias = 2 * width + (net.gin ? 1 + 3 * width + width * width : 0);
  const int64_t first = (net.features + 1) * width + behind_bias, later = (width + 1) * width + behind_bias;
  const int64_t start = l == 0 ? 0 : first + (l - 1) * later;
  const float* from = parameters + start;
  float* to = weights + net.block_start(l);
  const auto rows = [&](int64_t count, int64_t room) {
    for (int64_t i = threadIdx.x; i < room * stride; i += kThreads) {
      const int64_t row = i / stride, column = i % stride;
      to[i] = row < count && column < width ? from[row * width + column] : 0.0f;
    }
    from += count * width;
    to += room * stride;
  };
  rows(l == 0 ? net.features : width, l == 0 ? net.features : stride);
  rows(1, 1);
  if (net.gin) {
    if (threadIdx.x == 0) {
      self_weight[l] = *from;
    }
    ++from;
    rows(2, 2);
    rows(width, stride);
    rows(1, 1);
  }
  rows(2, 2);
}

// A block per step: the `edited` graphs of the smallest draws, of equal draws those of smaller numbers.
__global__ void __launch_bounds__(kThreads, 2) choose_kernel(Job a) {
  ACGKD_FAST_DYNAMIC_SHARED(shared);
  int* partial = reinterpret_cast<int*>(shared);
  const int step = static_cast<int>(blockIdx.x), graphs = a.pool.graphs;
  const auto key = [&](int graph) {
    double u[4];
    uniforms(a, graph, a.first_step + step, 0, u);
    // u = (k + 1/2) 2^-23: the same order in whole numbers.
    return static_cast<int>(u[0] * 8388608.0);
  };
  // The smallest key that, with all below, covers as many as are wanted.
  int low = 0, high = (1 << 23) - 1;
  while (low < high) {
    const int middle = (low + high) / 2;
    int covered = 0;
    for (int first = 0; first < graphs; first += kThreads) {
      const int graph = first + static_cast<int>(threadIdx.x);
      covered += __syncthreads_count(graph < graphs && key(graph) <= middle);
    }
    (covered >= a.edited ? high : low) = covered >= a.edited ? middle : middle + 1;
  }
  int below = 0;
  for (int first = 0; first < graphs; first += kThreads) {
    const int graph = first + static_cast<int>(threadIdx.x);
    below += __syncthreads_count(graph < graphs && key(graph) < low);
  }
  int left = a.edited - below;
  for (int first = 0; first < graphs; first += kThreads) {
    const int graph = first + static_cast<int>(threadIdx.x);
    const int mine = graph < graphs ? key(graph) : INT32_MAX;
    int equal;
    const int place = place_in_block(mine == low, partial, equal);
    if (graph < graphs) {
      a.rounds.picked[static_cast<int64_t>(step) * graphs + graph] = mine < low || (mine == low && place < left);
    }
    left -= equal;
  }
}

// A block per round: the graphs that any of its steps edits, ascending.
__global__ void __launch_bounds__(kThreads, 2) list_kernel(Job a) {
  ACGKD_FAST_DYNAMIC_SHARED(shared);
  int* partial = reinterpret_cast<int*>(shared);
  const int round = static_cast<int>(blockIdx.x), graphs = a.pool.graphs;
  int size = 0;
  for (int first = 0; first < graphs; first += kThreads) {
    const int graph = first + static_cast<int>(threadIdx.x);
    bool edited = false;
    for (int step = a.rounds.begin[round]; graph < graphs && step < a.rounds.begin[round + 1]; ++step) {
      edited |= a.rounds.picked[static_cast<int64_t>(step) * graphs + graph] != 0;
    }
    int total;
    const int place = place_in_block(edited, partial, total);
    if (edited) {
      a.rounds.list[static_cast<int64_t>(round) * graphs + size + place] = graph;
    }
    size += total;
  }
  if (threadIdx.x == 0) {
    a.rounds.count[round] = size;
  }
}

// Energy::slope of csrc/cpu/search_energy.h for the channels of a block.
__device__ __forceinline__ void linearise(const Job& a) {
  const Energy& e = a.energy;
  const int channels = a.net.channels(), width = a.net.width;
  const double factor = e.lam_k / (e.rows * static_cast<double>(channels));
  for (int c = static_cast<int>(threadIdx.x); c < channels; c += static_cast<int>(blockDim.x)) {
    const double mean = e.running[c], target = e.running[channels + c], floor = e.running[2 * channels + c];
    const double first = a.total[c] / e.rows, second = a.total[channels + c] / e.rows;
    const double variance = second - __dmul_rn(first, first);
    const double in_second = variance >= 0.0 ? 0.5 / target - 0.5 / (variance + floor) : 0.0;
    double* to = a.slope + c / width * 2 * a.net.stride + c % width;
    to[0] = factor * ((first - mean) / target - __dmul_rn(2.0 * first, in_second));
    to[a.net.stride] = factor * in_second;
  }
}

// Energy::k, by the lanes of a warp; the same in all of them.
__device__ __forceinline__ double divergence(const Job& a, const double* total) {
  const Energy& e = a.energy;
  const int channels = a.net.channels();
  double sum = 0.0;
  for (int c = static_cast<int>(threadIdx.x) % kWarp; c < channels; c += kWarp) {
    const double mean = e.running[c], target = e.running[channels + c], floor = e.running[2 * channels + c];
    const double first = total[c] / e.rows, second = total[channels + c] / e.rows;
    const double variance = second - __dmul_rn(first, first);
    const double ratio = ((variance < 0.0 ? 0.0 : variance) + floor) / target;
    sum += ratio - 1.0 - log(ratio) + __dmul_rn(first - mean, first - mean) / target;
  }
  return 0.5 * group_sum(sum, kWarp) / static_cast<double>(channels);
}

__global__ void __launch_bounds__(kSettleThreads, 1) start_kernel(Job a, const double* total, const double* level) {
  const int thread = static_cast<int>(threadIdx.x);
  for (int k = thread; k < a.net.sums(); k += kSettleThreads) {
    a.slope[k] = 0.0;
  }
  for (int k = thread; k < 2 * a.net.channels(); k += kSettleThreads) {
    a.total[k] = total[k];
  }
  for (int step = thread; step < a.steps; step += kSettleThreads) {
    a.trace[step] = NAN;
  }
  if (thread < 2) {
    a.level[thread] = level[thread];
    a.progress[thread] = 0;
  }
  if (thread == 0) {
    *a.stopped = 0;
  }
  __syncthreads();
  linearise(a);
}

// Of the graphs that passed, `passed` in all, the better half survives each halving. Sets how many a graph survives.
__device__ __forceinline__ void rank(const Job& a, const int* list, int count, int place) {
  const Record& mine = a.pool.records[list[place]];
  if (mine.accepted == 0) {
    a.survives[place] = -1;
    return;
  }
  int passed = 0, better = 0;
  for (int other = 0; other < count; ++other) {
    const Record& record = a.pool.records[list[other]];
    passed += record.accepted != 0;
    better += record.accepted != 0 && (record.delta < mine.delta || (record.delta == mine.delta && other < place));
  }
  int halvings = 0;
  while (better < passed >> (halvings + 1)) {
    ++halvings;
  }
  a.survives[place] = halvings;
}

// One number of the pool after some halvings, added up in the order of the graphs.
__device__ __forceinline__ void sum_candidate(const Job& a, const int* list, int count, int halvings, int k) {
  const int channels = a.net.channels(), width = a.net.width;
  double* to = a.candidate + static_cast<int64_t>(halvings) * (2 * channels + 1) + k;
  const int order = k / channels, channel = k % channels;
  const int at = (2 * (channel / width) + order) * a.net.stride + channel % width;
  const bool is_excess = k == 2 * channels;
  double sum = is_excess ? 0.0 : a.total[k];
#pragma unroll 4
  for (int i = 0; i < count; ++i) {
    const int64_t graph = list[i];
    if (a.survives[i] >= halvings) {
      sum += is_excess ? a.pool.records[graph].excess_change : a.pool.change[graph * a.net.sums() + at];
    }
  }
  *to = is_excess ? sum + a.level[0] : sum;
}

__global__ void __launch_bounds__(kThreads, 2) rank_kernel(Job a, int round) {
  const int place = static_cast<int>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x);
  const int count = a.rounds.count[round];
  if (*a.stopped || place >= count) {
    return;
  }
  rank(a, a.rounds.list + static_cast<int64_t>(round) * a.pool.graphs, count, place);
}

// Block b takes slice b % slices of the numbers after b / slices halvings.
__global__ void __launch_bounds__(kWarp) candidates_kernel(Job a, int round, int slices) {
  const int halvings = static_cast<int>(blockIdx.x) / slices;
  const int k = static_cast<int>(blockIdx.x) % slices * kWarp + static_cast<int>(threadIdx.x);
  if (*a.stopped || k > 2 * a.net.channels()) {
    return;
  }
  const int* list = a.rounds.list + static_cast<int64_t>(round) * a.pool.graphs;
  sum_candidate(a, list, a.rounds.count[round], halvings, k);
}

struct Verdict {
  double value, earlier;
  int halvings, passed, taken, accepted;
};

// Keeps the edits of a round if together they do not raise the true energy; else tries the more promising half, and so
// on. kAlone: ranks and candidates have not been prepared by launches of their own.
template <bool kAlone>
__global__ void __launch_bounds__(kSettleThreads, 1) settle_kernel(Job a, int round) {
  ACGKD_FAST_DYNAMIC_SHARED(shared);
  Verdict& verdict = *reinterpret_cast<Verdict*>(shared);
  if (*a.stopped) {
    return;
  }
  const int thread = static_cast<int>(threadIdx.x), channels = a.net.channels(), numbers = 2 * channels + 1;
  const int* list = a.rounds.list + static_cast<int64_t>(round) * a.pool.graphs;
  const int count = a.rounds.count[round], end = a.rounds.begin[round + 1];
  int passed = 0;
  for (int first = 0; first < count; first += kSettleThreads) {
    const int place = first + thread;
    passed += __syncthreads_count(place < count && a.pool.records[list[place < count ? place : 0]].accepted != 0);
    if (kAlone && place < count) {
      rank(a, list, count, place);
    }
  }
  const double earlier = a.level[1];
  int halvings = 0;
  bool kept = false;
  for (; !kept && passed >> halvings > 0; halvings += !kept) {
    double* const candidate = a.candidate + static_cast<int64_t>(halvings) * numbers;
    __syncthreads();
    if (kAlone) {
      for (int k = thread; k < numbers; k += kSettleThreads) {
        sum_candidate(a, list, count, halvings, k);
      }
      __syncthreads();
    }
    if (thread < kWarp) {
      const double k = divergence(a, candidate);
      if (thread == 0) {
        verdict.value = a.energy.value(k, candidate[2 * channels]);
      }
    }
    __syncthreads();
    kept = a.temperature > 0.0 || verdict.value <= earlier;
    if (kept) {
      for (int k = thread; k < 2 * channels; k += kSettleThreads) {
        a.total[k] = candidate[k];
      }
    }
  }
  int accepted = 0;
  for (int first = 0; first < count; first += kSettleThreads) {
    const int place = first + thread;
    const bool stays = kept && place < count && a.survives[place] >= halvings;
    if (stays) {
      Record& record = a.pool.records[list[place]];
      record.side = 1 - record.side;
      accepted += record.accepted;
    }
  }
  __syncthreads();
  linearise(a);
  for (int step = a.rounds.begin[round] + thread; step < end; step += kSettleThreads) {
    a.trace[step] = kept && step + 1 == end ? verdict.value : earlier;
  }
  int* const totals = reinterpret_cast<int*>(&verdict + 1);
  const int together = group_sum(accepted, kWarp);
  if (thread % kWarp == 0) {
    totals[thread / kWarp] = together;
  }
  __syncthreads();
  if (thread < kWarp) {
    const int64_t step = a.first_step + end;
    const bool look = a.stop_k > 0.0 && step >= a.min_steps && step % kCheckEvery == 0;
    const bool low = look && divergence(a, a.total) < a.stop_k;
    if (thread == 0) {
      for (int warp = 0; warp < kSettleThreads / kWarp; ++warp) {
        a.progress[1] += totals[warp];
      }
      a.progress[0] = end;
      *a.stopped = low;
      if (kept) {
        a.level[0] = a.candidate[static_cast<int64_t>(halvings) * numbers + 2 * channels];
        a.level[1] = verdict.value;
      }
    }
  }
}

}  // namespace

void launch_pad(cudaStream_t stream, const Network& net, const float* parameters, float* weights, float* self_weight) {
  launch(stream, pad_kernel, net.depth, kThreads, 0, net, parameters, weights, self_weight);
}

void launch_choose(cudaStream_t stream, const Job& job, int rounds) {
  launch(stream, choose_kernel, job.steps, kThreads, kWarps * sizeof(int), job);
  launch(stream, list_kernel, rounds, kThreads, kWarps * sizeof(int), job);
}

void launch_start(cudaStream_t stream, const Job& job, const double* total, const double* level) {
  launch(stream, start_kernel, 1, kSettleThreads, 0, job, total, level);
}

void launch_settle(cudaStream_t stream, const Job& job, int round, int64_t most_graphs) {
  constexpr size_t kBytes = sizeof(Verdict) + kSettleThreads / kWarp * sizeof(int);
  if (most_graphs <= kSettledByOneBlock) {
    launch(stream, settle_kernel<true>, 1, kSettleThreads, kBytes, job, round);
    return;
  }
  int levels = 1;
  while (job.temperature == 0.0 && most_graphs >> levels > 0) {
    ++levels;
  }
  const int slices = static_cast<int>(ceil_div(2 * job.net.channels() + 1, kWarp));
  launch(stream, rank_kernel, ceil_div(most_graphs, kThreads), kThreads, 0, job, round);
  launch(stream, candidates_kernel, int64_t{slices} * levels, kWarp, 0, job, round, slices);
  launch(stream, settle_kernel<false>, 1, kSettleThreads, kBytes, job, round);
}

}  // namespace acgkd_fast::cuda::search
