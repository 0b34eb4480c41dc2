// One graph of the search in the memory of a block: proposals, edits of its edges, and which rows an edit reaches.
//
// One warp does this; the order of everything is that of csrc/cpu/search_graph.cpp, because sums follow it.
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
    for (int node = static_cast<int>(threadIdx.x); node < nodes; node += kThreads) {
      int found = 0;
      for (int w = 0; w < words; ++w) {
        found += __popc(adjacency[node * words + w]);
      }
      degree[node] = found;
      degree_scale[node] = scale_of(found);
      place[node] = kClean;
    }
    for (int l = static_cast<int>(threadIdx.x); l <= net.depth; l += kThreads) {
      count[l] = 0;
    }
  }

  __device__ __forceinline__ static int index(double u, int n) { return static_cast<int>(u * static_cast<double>(n)); }

  // moves.propose in acgkd_fast/distill/moves.py.
  __device__ __forceinline__ Edit propose(const double (&u)[4], double end, const int64_t* pairs) const {
    const MoveMix& mix = job.mix;
    const int edges = trial->count;
    Edit edit{};
    edit.move = (u[1] >= mix.below_relabel) + (u[1] >= mix.below_rewire) + (u[1] >= mix.below_add);
    if (edit.move == kRelabel) {
      edit.valid = mix.num_labels > 1;
      if (edit.valid) {
        edit.node = index(u[2], nodes);
        edit.label_before = label[edit.node];
        edit.label_after = (edit.label_before + 1 + index(u[3], mix.num_labels - 1)) % mix.num_labels;
      }
      return edit;
    }
    int one, two;
    if (edit.move == kAdd) {
      if (nodes < 2) {
        return edit;
      }
      one = index(u[2], nodes);
      two = index(u[3], nodes - 1);
      two += two >= one;
      edit.slot = edges;
    } else {
      if (edges == 0) {
        return edit;
      }
      edit.slot = index(u[2], edges);
      const int64_t pair = pairs[edit.slot];
      edit.old_low = static_cast<int>(pair >> 32);
      edit.old_high = static_cast<int>(pair & 0xffffffff);
      if (edit.move == kDelete) {
        edit.valid = 1;
        return edit;
      }
      if (nodes < 3) {
        return edit;
      }
      one = end < 0.5 ? edit.old_low : edit.old_high;
      two = index(u[3], nodes - 2);
      two += two >= edit.old_low;
      two += two >= edit.old_high;
    }
    edit.new_low = min(one, two);
    edit.new_high = max(one, two);
    edit.valid = !adjacent(one, two);
    return edit;
  }

  __device__ __forceinline__ void toggle(int a, int b, int by) const {
    adjacency[a * words + b / 32] ^= 1u << (b % 32);
    degree[a] += by;
    degree_scale[a] = scale_of(degree[a]);
  }

  // Carries out an edit in adjacency and labels, or takes it back; by one thread.
  __device__ __forceinline__ void carry_out(const Edit& edit, bool forward) const {
    if (edit.move == kRelabel) {
      label[edit.node] = forward ? edit.label_after : edit.label_before;
      return;
    }
    if (edit.move != kAdd) {
      toggle(edit.old_low, edit.old_high, forward ? -1 : 1);
      toggle(edit.old_high, edit.old_low, forward ? -1 : 1);
    }
    if (edit.move != kDelete) {
      toggle(edit.new_low, edit.new_high, forward ? 1 : -1);
      toggle(edit.new_high, edit.new_low, forward ? 1 : -1);
    }
  }

  // Appends a node to the `size` marked ones. These two are called by a whole warp.
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

  // Which rows an edit that has been carried out changes, in the order of their distance.
  __device__ void mark_reached(const Edit& edit) const {
    const int lane = static_cast<int>(threadIdx.x);
    for (int i = lane; i < count[net.depth]; i += kWarp) {
      place[dirty[i]] = kClean;
    }
    __syncwarp();
    int size = 0;
    if (edit.move == kRelabel) {
      size = mark(edit.node, size);
    }
    const int at_input = size;
    if (edit.move != kRelabel) {
      const bool goes = edit.move != kAdd, comes = edit.move != kDelete;
      if (goes) {
        size = mark(edit.old_high, mark(edit.old_low, size));
      }
      if (comes) {
        size = mark(edit.new_high, mark(edit.new_low, size));
      }
      const int ends = net.gin ? 0 : size;
      for (int i = 0; i < ends; ++i) {
        // A rewired edge leaves the degree of the end that it keeps alone.
        const int node = dirty[i];
        const bool lost = goes && (node == edit.old_low || node == edit.old_high);
        const bool won = comes && (node == edit.new_low || node == edit.new_high);
        if (lost != won) {
          size = mark_neighbours(node, size);
        }
      }
    }
    int reached = at_input, expanded = 0;
    for (int l = 0; l < net.depth; ++l) {
      for (; expanded < reached && size < nodes; ++expanded) {
        size = mark_neighbours(dirty[expanded], size);
      }
      reached = size;
      if (lane == 0) {
        count[l + 1] = size;
      }
    }
    if (lane == 0) {
      count[0] = at_input;
    }
    __syncwarp();
  }

  // Finds the next possible edit of the round and carries it out; by warp 0.
  __device__ void next_edit(int end, const int64_t* pairs) const {
    int step = trial->step;
    __syncwarp();
    for (; step < end; ++step) {
      if (job.rounds.picked[static_cast<int64_t>(step) * job.pool.graphs + graph] == 0) {
        continue;
      }
      double u[4], v[4];
      uniforms(job, graph, job.first_step + step, 0, u);
      uniforms(job, graph, job.first_step + step, 1, v);
      const Edit edit = propose(u, v[0], pairs);
      if (!edit.valid) {
        continue;
      }
      __syncwarp();
      if (threadIdx.x == 0) {
        trial->edit = edit;
        trial->step = step + 1;
        trial->accept_uniform = v[1];
        carry_out(edit, true);
      }
      __syncwarp();
      mark_reached(edit);
      return;
    }
    if (threadIdx.x == 0) {
      trial->edit.valid = 0;
    }
  }
};

}  // namespace acgkd_fast::cuda::search
