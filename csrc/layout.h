// Closed-form maps between pair numbers and node pairs (see acgkd_fast/layout.py), shared by C++ and CUDA.
#pragma once

#include <cmath>
#include <cstdint>

#include "philox.h"

namespace acgkd {

// Bits of the `kind` that the operators take.
constexpr int64_t kBudget = 1;
constexpr int64_t kDirected = 2;

// One graph of a batch. Node numbers below are local to it.
struct GraphLayout {
  int64_t first_node, num_nodes;
  int64_t first_pair, num_pairs;
  int64_t band;
  uint32_t id;
};

// `table` is int64 [4, num_graphs + 1]: node offsets, pair offsets, graph ids, band widths.
ACGKD_SHARED GraphLayout graph_layout(const int64_t* table, int64_t num_graphs, int64_t graph) {
  const int64_t width = num_graphs + 1;
  const int64_t* nodes = table + graph;
  const int64_t* pairs = nodes + width;
  return {nodes[0], nodes[1] - nodes[0], pairs[0], pairs[1] - pairs[0], nodes[3 * width],
          static_cast<uint32_t>(nodes[2 * width])};
}

ACGKD_SHARED int64_t triangle(int64_t n) { return n * (n - 1) / 2; }

// Candidate pairs of a graph with n nodes.
ACGKD_SHARED int64_t count_pairs(int64_t n, int64_t band, int64_t kind) {
  const int64_t all = triangle(n), ring = n * band;
  const int64_t undirected = (kind & kBudget) && ring < all ? ring : all;
  return kind & kDirected ? 2 * undirected : undirected;
}

struct NodePair {
  int64_t row, col;
};

// The larger node of undirected pair `local` of a complete graph.
ACGKD_SHARED int64_t complete_high(int64_t local) {
  int64_t high = static_cast<int64_t>((1.0 + std::sqrt(1.0 + 8.0 * static_cast<double>(local))) / 2.0);
  // The square root is off by one at most.
  if (triangle(high) > local) --high;
  if (triangle(high + 1) <= local) ++high;
  return high;
}

// Undirected pairs come with row < col.
ACGKD_SHARED NodePair pair_nodes(int64_t local, int64_t num_nodes, int64_t kind) {
  const bool swapped = (kind & kDirected) && (local & 1);
  if (kind & kDirected) local >>= 1;
  int64_t low, high;
  if (kind & kBudget) {
    const int64_t start = local % num_nodes;
    const int64_t ahead = start + local / num_nodes + 1;
    const int64_t end = ahead < num_nodes ? ahead : ahead - num_nodes;
    low = start < end ? start : end;
    high = start < end ? end : start;
  } else {
    high = complete_high(local);
    low = local - triangle(high);
  }
  if (swapped) return {high, low};
  return {low, high};
}

// Number in the whole batch of the undirected pair of two nodes of a graph; -1 where the layout has none.
ACGKD_SHARED int64_t pair_number(int64_t one, int64_t two, const GraphLayout& graph, int64_t kind) {
  const int64_t low = one < two ? one : two, high = one < two ? two : one;
  if (low == high) return -1;
  if (!(kind & kBudget)) return graph.first_pair + triangle(high) + low;
  // At distance n / 2 both directions name the pair; the lower node starts it.
  const int64_t ahead = high - low, around = graph.num_nodes - ahead;
  const bool forward = ahead <= around;
  const int64_t distance = forward ? ahead : around;
  if (distance > graph.band) return -1;
  return graph.first_pair + (distance - 1) * graph.num_nodes + (forward ? low : high);
}

}  // namespace acgkd
