// One graph of the search in the memory of a block: where it lies, edits of its edges, and which rows an edit reaches.
//
// The order of everything is that of csrc/cpu/search_graph.cpp, because sums follow it.
#pragma once

#include "search.h"

namespace acgkd_fast::cuda::search {

// kShared: state and scratch are in shared memory, which the compiler then knows; else in global memory.
template <bool kShared>
struct Graph {
  const Job& job;
  const Network& net;
  int graph, nodes, words;
  double *change, *logits;
  Trial* trial;
  float* pooled;
  int* count;  // rows that an edit changes, per level; see SearchGraph in csrc/cpu/search_graph.h
  float* features;
  unsigned* adjacency;
  int* label;
  float* rows;
  int *place, *dirty, *degree;
  float* degree_scale;

  // `state` is used where the graph is not kept in shared memory.
  __device__ Graph(const Job& a, int number, unsigned char* shared, float* state) : job(a), net(a.net), graph(number) {
    nodes = static_cast<int>(a.pool.ptr[number + 1] - a.pool.ptr[number]);
    words = (nodes + 31) / 32;
    change = reinterpret_cast<double*>(shared);
    logits = change + net.sums();
    trial = reinterpret_cast<Trial*>(logits + net.classes);
    pooled = reinterpret_cast<float*>(trial + 1);
    count = reinterpret_cast<int*>(pooled + net.stride);
    if constexpr (kShared) {
      features = reinterpret_cast<float*>(shared + fixed_bytes(net));
      rows = features + state_words(net, nodes);
    } else {
      features = state;
      rows = a.pool.scratch + a.pool.scratch_start[number];
    }
    const int row_words = nodes * net.stride;
    adjacency = reinterpret_cast<unsigned*>(features + net.planes() * row_words);
    label = reinterpret_cast<int*>(adjacency + nodes * words);
    place = reinterpret_cast<int*>(rows + net.buffers() * row_words);
    dirty = place + nodes;
    degree = dirty + nodes;
    degree_scale = reinterpret_cast<float*>(degree + nodes);
  }

  __device__ __forceinline__ bool adjacent(int a, int b) const {
    return (adjacency[a * words + b / 32] >> (b % 32) & 1u) != 0;
  }

  __device__ __forceinline__ float scale_of(int degree) const { return 1.0f / sqrtf(static_cast<float>(degree + 1)); }

  // Degrees and clean marks, by the whole block.
  __device__ void prepare() const {
    for (int node = static_cast<int>(threadIdx.x); node < nodes; node += kEditThreads) {
      int found = 0;
      for (int w = 0; w < words; ++w) {
        found += __popc(adjacency[node * words + w]);
      }
      degree[node] = found;
      degree_scale[node] = scale_of(found);
      place[node] = kClean;
    }
    for (int l = static_cast<int>(threadIdx.x); l <= net.depth; l += kEditThreads) {
      count[l] = 0;
    }
  }

  __device__ __forceinline__ void toggle(int a, int b, int by) const {
    adjacency[a * words + b / 32] ^= 1u << (b % 32);
    degree[a] += by;
    degree_scale[a] = scale_of(degree[a]);
  }

  __device__ __forceinline__ void link(Edge edge, int by) const {
    toggle(edge.low, edge.high, by);
    toggle(edge.high, edge.low, by);
  }

  // Carries out an edit in adjacency and labels, or takes it back; by one thread.
  __device__ __forceinline__ void carry_out(const Edit& edit, bool forward) const {
    if (edit.move == kRelabel) {
      label[edit.node] = forward ? edit.label_after : edit.label_before;
    }
    for (int k = 0; k < edit.num_old; ++k) {
      link(edit.old[k], forward ? -1 : 1);
    }
    for (int k = 0; k < edit.num_fresh; ++k) {
      link(edit.fresh[k], forward ? 1 : -1);
    }
  }

  // Appends a node to the `size` marked ones. From here on, warp 0 works alone.
  __device__ __forceinline__ int mark(int node, int size) const {
    const bool is_new = place[node] == kClean;
    __syncwarp();
    if (is_new && threadIdx.x == 0) {
      place[node] = size;
      dirty[size] = node;
    }
    __syncwarp();
    return size + (is_new ? 1 : 0);
  }

  __device__ __forceinline__ int mark_neighbours(int node, int size) const {
    const int lane = static_cast<int>(threadIdx.x);
    for (int base = 0; base < words; base += kWarp) {
      const unsigned word = base + lane < words ? adjacency[node * words + base + lane] : 0u;
      for (unsigned filled = __ballot_sync(kAllLanes, word != 0u); filled != 0u; filled &= filled - 1) {
        const int at = __ffs(static_cast<int>(filled)) - 1;
        const unsigned bits = __shfl_sync(kAllLanes, word, at);
        const int other = (base + at) * 32 + lane;
        const bool is_new = (bits >> lane & 1u) != 0 && place[other] == kClean;
        const unsigned fresh = __ballot_sync(kAllLanes, is_new);
        if (is_new) {
          const int position = size + __popc(fresh & ((1u << lane) - 1u));
          place[other] = position;
          dirty[position] = other;
        }
        size += __popc(fresh);
      }
    }
    __syncwarp();
    return size;
  }

  __device__ __forceinline__ void clear_marks() const {
    for (int i = static_cast<int>(threadIdx.x); i < count[net.depth]; i += kWarp) {
      place[dirty[i]] = kClean;
    }
    __syncwarp();
  }

  __device__ bool connected() const {
    clear_marks();
    int size = mark(0, 0);
    for (int i = 0; i < size && size < nodes; ++i) {
      size = mark_neighbours(dirty[i], size);
    }
    if (threadIdx.x == 0) {
      count[net.depth] = size;
    }
    __syncwarp();
    return size == nodes;
  }

  // Which rows the edit changes that has been carried out, in the order of their distance.
  __device__ void mark_reached() const {
    const Edit& edit = trial->edit;
    clear_marks();
    int size = edit.move == kRelabel ? mark(edit.node, 0) : 0;
    const int at_input = size;
    for (int k = 0; k < edit.num_old; ++k) {
      size = mark(edit.old[k].high, mark(edit.old[k].low, size));
    }
    for (int k = 0; k < edit.num_fresh; ++k) {
      size = mark(edit.fresh[k].high, mark(edit.fresh[k].low, size));
    }
    // A swap changes no degree, and a rewired edge leaves that of the end that it keeps alone.
    const int ends = net.gin || edit.move == kRelabel || edit.move == kSwap ? 0 : size;
    for (int i = 0; i < ends; ++i) {
      const int node = dirty[i];
      const bool lost = edit.num_old != 0 && edit.old[0].ends_in(node);
      const bool won = edit.num_fresh != 0 && edit.fresh[0].ends_in(node);
      if (lost != won) {
        size = mark_neighbours(node, size);
      }
    }
    int reached = at_input, expanded = 0;
    for (int l = 0; l < net.depth; ++l) {
      for (; expanded < reached && size < nodes; ++expanded) {
        size = mark_neighbours(dirty[expanded], size);
      }
      reached = size;
      if (threadIdx.x == 0) {
        count[l + 1] = size;
      }
    }
    if (threadIdx.x == 0) {
      count[0] = at_input;
    }
    __syncwarp();
  }
};

}  // namespace acgkd_fast::cuda::search
