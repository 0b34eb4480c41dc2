// What the host and the kernels of the search over hard graphs share; see "CUDA" in docs/search.md.
#pragma once

#include "../philox.h"
#include "lanes.h"

namespace acgkd_fast::cuda::search {

// The numbers of csrc/cpu/search_network.h, search_graph.h and search.cpp, which this search repeats bit by bit.
constexpr int kTile = 16;
constexpr uint32_t kProposalStream = 3;
constexpr int kCheckEvery = 10;
constexpr int kClean = INT32_MAX;
constexpr int kDotParts = 8;
enum Move : int { kRelabel = 0, kRewire = 1, kAdd = 2, kDelete = 3, kSwap = 4 };
enum Pooling : int { kSum = 0, kMean = 1, kMax = 2 };

__host__ __device__ inline int64_t rounded_up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

// Pointers into the padded weights. Rows have `stride` floats; what is behind `width` is zero throughout the network.
struct Layer {
  const float *weight, *bias, *inner_scale, *inner_shift, *second, *second_bias, *scale, *shift;
};

// The teacher; formulas in csrc/cpu/search_network.h. Products run over `stride` inputs: weights have zeros there.
struct Network {
  const float* weights;      // per block W, b, (inner scale, inner shift, W2, b2,) scale, shift
  const float* self_weight;  // [depth], 1 + eps of GIN
  const float* classifier;   // [classes, width]
  const float* bias;         // [classes]
  int depth, features, width, stride, classes, pooling;
  bool gin;

  __host__ __device__ int norms() const { return gin ? 2 * depth : depth; }
  __host__ __device__ int channels() const { return norms() * width; }
  // Moment sums of a graph, [norms, 2, stride].
  __host__ __device__ int sums() const { return norms() * 2 * stride; }
  // Matrices of features that stay: Z and A (GIN: and Y) of every block, and the output of the last. Outputs in between
  // are cheaper to compute anew than to hold.
  __host__ __device__ int planes() const { return (gin ? 3 : 2) * depth + 1; }
  // Matrices that hold what one edit changes, one block at a time.
  __host__ __device__ int buffers() const { return gin ? 4 : 3; }

  __host__ __device__ int64_t block_words(int64_t inputs) const {
    return (inputs + 3 + (gin ? 3 + stride : 0)) * stride;
  }
  __host__ __device__ int64_t block_start(int64_t l) const {
    return l == 0 ? 0 : block_words(features) + (l - 1) * block_words(stride);
  }
  __device__ __forceinline__ Layer layer(int l) const {
    Layer to{};
    to.weight = weights + block_start(l);
    to.bias = to.weight + static_cast<int64_t>(l == 0 ? features : stride) * stride;
    to.scale = to.bias + stride;
    if (gin) {
      to.inner_scale = to.bias + stride;
      to.inner_shift = to.inner_scale + stride;
      to.second = to.inner_shift + stride;
      to.second_bias = to.second + stride * stride;
      to.scale = to.second_bias + stride;
    }
    to.shift = to.scale + stride;
    return to;
  }
};

// Words of 4 bytes. A graph's state is its features, adjacency bits and labels, its scratch the rows of an edit and
// four numbers per node.
__host__ __device__ inline int64_t label_start(const Network& net, int64_t nodes) {
  return nodes * (int64_t{net.planes()} * net.stride + (nodes + 31) / 32);
}
__host__ __device__ inline int64_t state_words(const Network& net, int64_t nodes) {
  return rounded_up(label_start(net, nodes) + nodes, 4);
}
__host__ __device__ inline int64_t scratch_words(const Network& net, int64_t nodes) {
  return rounded_up(nodes * (int64_t{net.buffers()} * net.stride + 4), 4);
}

// An undirected edge, low < high.
struct Edge {
  int low, high;

  __device__ __forceinline__ bool ends_in(int node) const { return node == low || node == high; }
};

// As in csrc/cpu/search_proposal.h.
struct Edit {
  int move, valid;
  int slot[2];  // positions in the edge list
  Edge old[2], fresh[2];
  int num_old, num_fresh;
  int node, label_before, label_after;
};

// What a graph did in a round so far. Only warp 0 writes.
struct Trial {
  Edit edit, best;  // under way, and the best of the candidates so far
  int step, candidate, retried, count, accepted, hit, passes;
  double loss, delta, excess_change, best_delta, accept_uniform, log_ratio, slope_product;
};

// Parts of shared memory that every graph has, in bytes: change of the sums, logits, trial, pooled row, rows per level.
__host__ __device__ inline int64_t fixed_bytes(const Network& net) {
  return rounded_up(sizeof(double) * (net.sums() + net.classes) + sizeof(Trial) +
                        sizeof(float) * (net.stride + net.depth + 1),
                    16);
}
__host__ __device__ inline int64_t shared_bytes(const Network& net, int64_t nodes) {
  return fixed_bytes(net) + 4 * (state_words(net, nodes) + scratch_words(net, nodes));
}

// acgkd_fast/distill/energy.py. Products that are added to something are rounded first, as on the CPU: fused, equal
// losses would differ.
struct Energy {
  const double* running;  // [3, channels]: mean, target, floor
  double rows, lam_k, share, cap;

  __device__ __forceinline__ double excess(double loss) const {
    const double above = loss - cap;
    return __dmul_rn(above < 0.0 ? 0.0 : above, share);
  }
  __device__ __forceinline__ double value(double k, double excess) const { return __dmul_rn(lam_k, k) + excess; }
};

// ProposalRules of csrc/cpu/search_proposal.h, and the weights of the candidate pairs where new edges are not uniform.
struct Rules {
  double below_relabel, below_rewire, below_add, two_hop;
  int num_labels, max_degree, proposals;
  bool keep_degrees, connected;
  const double *weight, *cumulative;
  const int64_t* table;  // of the layout, [4, graphs + 1]
  int64_t kind;
};

// A graph has two copies of everything that an edit changes. A round reads the one of `side` and writes the other; if
// the pool keeps the round, `side` flips, and if not, nothing needs to be undone.
struct Record {
  int side, accepted;
  int count[2], hit[2];
  double loss[2];
  double delta, excess_change;
};

struct Pool {
  int graphs;
  int64_t capacity, side_words;
  const int64_t *ptr, *y, *ids;
  const int64_t* state_start;    // [graphs], in words
  const int64_t* scratch_start;  // [graphs], in words; of graphs that do not fit shared memory
  const float* x;
  float *state, *scratch;
  int64_t* pairs[2];  // [graphs, capacity]
  double* sums[2];    // [graphs, 2, channels]
  double* change;     // [graphs, sums()]
  Record* records;
};

struct Rounds {
  const int* begin;      // [rounds + 1], steps of this call
  unsigned char* picked;  // [steps, graphs]
  int* list;             // [rounds, graphs], graphs edited in a round, ascending
  int* count;            // [rounds]
};

// Everything the kernels of one call need.
struct Job {
  Network net;
  Energy energy;
  Rules rules;
  Pool pool;
  Rounds rounds;
  acgkd::Key key;
  int64_t first_step, min_steps;
  int steps, edited;
  double temperature, stop_k;
  int shared_limit;  // bytes of shared memory that a block of the edit kernel has
  bool some_fit, some_do_not;
  double* slope;     // [sums()]
  double* total;     // [2, channels]
  double* level;     // excess, energy
  double* trace;     // [steps]
  int64_t* progress;  // taken, accepted
  int* stopped;
  int* survives;      // [graphs], per place in the round's list: halvings that the graph survives, -1: did not pass
  double* candidate;  // [levels, 2 channels + 1]: totals and excess of the pool after as many halvings
};

// A row of 64 channels takes 16 threads, so eight rows at once. Three graphs of 20 nodes and four blocks of 64 channels
// fill the memory of a processor, and three blocks of so many threads leave each thread the registers that it needs.
constexpr int kEditThreads = 128;
constexpr int kSettleThreads = 512;
// Up to so many graphs one block settles a round; beyond, the totals take a launch of their own.
constexpr int kSettledByOneBlock = 128;

// search_edit.cu
void launch_build(cudaStream_t stream, const Job& job, const int64_t* counts, const int64_t* label, const double* loss,
                  const bool* hit, const double* sums, const int64_t* pairs);
void launch_edit(cudaStream_t stream, const Job& job, int round, int64_t blocks);
void launch_finish(cudaStream_t stream, const Job& job, int64_t* counts, int64_t* label, double* loss, bool* hit);
// search_rounds.cu
void launch_pad(cudaStream_t stream, const Network& net, const float* parameters, float* weights, float* self_weight);
void launch_choose(cudaStream_t stream, const Job& job, int rounds);
void launch_start(cudaStream_t stream, const Job& job, const double* total, const double* level);
void launch_settle(cudaStream_t stream, const Job& job, int round, int64_t most_graphs);

__device__ __forceinline__ void uniforms(const Job& a, int64_t graph, int64_t step, uint32_t word, double (&u)[4]) {
  uint32_t c0 = word, c1 = static_cast<uint32_t>(a.pool.ids[graph]), c2 = static_cast<uint32_t>(step);
  uint32_t c3 = kProposalStream;
  acgkd::philox(c0, c1, c2, c3, a.key);
  u[0] = acgkd::uniform_of<double>(c0);
  u[1] = acgkd::uniform_of<double>(c1);
  u[2] = acgkd::uniform_of<double>(c2);
  u[3] = acgkd::uniform_of<double>(c3);
}

}  // namespace acgkd_fast::cuda::search
