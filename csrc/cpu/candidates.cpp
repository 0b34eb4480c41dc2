// candidate_gradient: products of the features of every candidate pair.
#include "cpu/candidates.h"

#include <algorithm>
#include <vector>

#include "cpu/pairs.h"
#include "cpu/simd.h"

namespace acgkd {
namespace {

// Nodes whose features one sweep keeps in the first-level cache.
constexpr int64_t kTile = 32;
// Pairs computed together, so that each load serves several products.
constexpr int kRows = 2, kCols = 4;

template <typename Stored>
struct Task {
  using Real = WideOf<Stored>;
  Features<Stored, Real> left, right;
  const Stored* node_term;
  Stored* out;

  // Gradients of the two directions between local nodes low < high; undirected pairs get their sum.
  template <bool kDirectedLayout>
  ACGKD_SHARED void put(const GraphLayout& graph, int64_t undirected, NodePair nodes, Real up, Real down) const {
    const Real low_term = static_cast<Real>(node_term[graph.first_node + nodes.row]);
    const Real high_term = static_cast<Real>(node_term[graph.first_node + nodes.col]);
    Stored* to = out + graph.first_pair;
    if (kDirectedLayout) {
      to[2 * undirected] = static_cast<Stored>(up + low_term);
      to[2 * undirected + 1] = static_cast<Stored>(down + high_term);
    } else {
      to[undirected] = static_cast<Stored>(up + (low_term + high_term));
    }
  }
};

// up = <left_col, right_row> and down = <left_row, right_col> of each of rows x cols; undirected: both in `up`.
template <bool kDirectedLayout, int kR, int kC, typename Stored>
ACGKD_SHARED void products(const Task<Stored>& task, const int64_t* rows, const int64_t* cols,
                           WideOf<Stored> (*up)[kC], WideOf<Stored> (*down)[kC]) {
  using Real = WideOf<Stored>;
  Vec<Real> ups[kR][kC] = {}, downs[kR][kC] = {};
  const auto step = [&](auto at) __attribute__((always_inline)) {
    Vec<Real> left_rows[kR], right_rows[kR];
    for (int r = 0; r < kR; ++r) left_rows[r] = at(task.left, rows[r]), right_rows[r] = at(task.right, rows[r]);
    for (int c = 0; c < kC; ++c) {
      const Vec<Real> left_col = at(task.left, cols[c]), right_col = at(task.right, cols[c]);
      for (int r = 0; r < kR; ++r) {
        ups[r][c] += left_col * right_rows[r];
        (kDirectedLayout ? downs : ups)[r][c] += left_rows[r] * right_col;
      }
    }
  };
  const int64_t width = task.left.width();
  int64_t k = 0;
  for (; k + kWidth<Real> <= width; k += kWidth<Real>) {
    step([&](const auto& x, int64_t node) __attribute__((always_inline)) { return x.full(node, k); });
  }
  if (k < width) step([&](const auto& x, int64_t node) __attribute__((always_inline)) { return x.tail(node, k); });
  for (int r = 0; r < kR; ++r) {
    for (int c = 0; c < kC; ++c) {
      up[r][c] = sum<Real>(ups[r][c]);
      down[r][c] = kDirectedLayout ? sum<Real>(downs[r][c]) : Real(0);
    }
  }
}

// All pairs of a complete graph whose smaller node is in begin .. end - 1.
template <bool kDirectedLayout, typename Stored>
ACGKD_SHARED void complete_tile(const Task<Stored>& task, const GraphLayout& graph, int64_t begin, int64_t end) {
  const int64_t n = graph.num_nodes;
  WideOf<Stored> up[kRows][kCols], down[kRows][kCols];
  for (int64_t high = begin + 1; high < n; high += kRows) {
    int64_t rows[kRows], cols[kCols];
    for (int r = 0; r < kRows; ++r) rows[r] = graph.first_node + std::min(high + r, n - 1);
    for (int64_t low = begin; low < std::min(end, high + kRows - 1); low += kCols) {
      for (int c = 0; c < kCols; ++c) cols[c] = graph.first_node + std::min(low + c, n - 1);
      products<kDirectedLayout, kRows, kCols>(task, rows, cols, up, down);
      for (int r = 0; r < kRows && high + r < n; ++r) {
        const int64_t last = std::min(end, high + r);
        for (int c = 0; c < kCols && low + c < last; ++c) {
          task.template put<kDirectedLayout>(graph, triangle(high + r) + low + c, {low + c, high + r}, up[r][c],
                                             down[r][c]);
        }
      }
    }
  }
}

// Undirected pairs begin .. end - 1 of a ring.
template <bool kDirectedLayout, typename Stored>
ACGKD_SHARED void ring_pairs(const Task<Stored>& task, const GraphLayout& graph, int64_t begin, int64_t end) {
  WideOf<Stored> up[1][1], down[1][1];
  for (int64_t pair = begin; pair < end; ++pair) {
    const NodePair nodes = pair_nodes(pair, graph.num_nodes, kBudget);
    const int64_t high = graph.first_node + nodes.col, low = graph.first_node + nodes.row;
    products<kDirectedLayout, 1, 1>(task, &high, &low, up, down);
    task.template put<kDirectedLayout>(graph, pair, nodes, up[0][0], down[0][0]);
  }
}

// target_clones does not reach templates, hence one overload per type.
#define ACGKD_FOR_TYPE(Stored)                                                                                  \
  ACGKD_CLONES static void part(const Task<Stored>& task, const GraphLayout& graph, int64_t kind, int64_t begin, \
                                int64_t end) {                                                                  \
    switch (kind) {                                                                                             \
      case 0:                                                                                                   \
        return complete_tile<false>(task, graph, begin, end);                                                   \
      case kDirected:                                                                                           \
        return complete_tile<true>(task, graph, begin, end);                                                    \
      case kBudget:                                                                                             \
        return ring_pairs<false>(task, graph, begin, end);                                                      \
      default:                                                                                                  \
        return ring_pairs<true>(task, graph, begin, end);                                                       \
    }                                                                                                           \
  }
ACGKD_FOR_TYPE(float)
ACGKD_FOR_TYPE(double)
ACGKD_FOR_TYPE(BFloat16)

}  // namespace

Tensor candidate_gradient(const Tensor& left, const Tensor& right, const Tensor& node_term, const Tensor& table,
                          int64_t kind, int64_t num_pairs) {
  const char* op = "candidate_gradient";
  const Layouts layouts(op, table, kind);
  check(op, "left", left, left.scalar_type(), {layouts.num_nodes, kAny});
  check(op, "right", right, left.scalar_type(), {layouts.num_nodes, left.size(1)});
  check(op, "node_term", node_term, left.scalar_type(), {layouts.num_nodes});
  STD_TORCH_CHECK(num_pairs == layouts.num_pairs, op, ": num_pairs: expected ", layouts.num_pairs, ", got ", num_pairs);
  const Tensor grad = new_tensor(left, {num_pairs}, left.scalar_type());
  by_dtype(op, left, [&](auto* type) {
    using Stored = std::remove_pointer_t<decltype(type)>;
    const int64_t nodes = layouts.num_nodes, width = left.size(1);
    const Task<Stored> task{{read<Stored>(left), nodes, width},
                            {read<Stored>(right), nodes, width},
                            read<Stored>(node_term),
                            write<Stored>(grad)};
    // Smaller nodes of a complete graph, or undirected pairs of a ring; begin .. end - 1 of one graph each.
    std::vector<PairRange> parts;
    const bool ring = kind & kBudget;
    for (int64_t g = 0; g < layouts.num_graphs; ++g) {
      const int64_t pairs = layouts[g].num_pairs / (kind & kDirected ? 2 : 1);
      const int64_t total = ring ? pairs : layouts[g].num_nodes, step = ring ? 1024 : kTile;
      for (int64_t begin = 0; begin < total; begin += step) parts.push_back({g, begin, std::min(total, begin + step)});
    }
    const int64_t count = static_cast<int64_t>(parts.size());
    const int64_t work = std::max<int64_t>(1, num_pairs * width);
    torch::stable::parallel_for(0, count, std::max<int64_t>(1, (count << 17) / work), [&](int64_t first, int64_t last) {
      for (int64_t p = first; p < last; ++p) part(task, layouts[parts[p].graph], kind, parts[p].begin, parts[p].end);
    });
  });
  return grad;
}

STABLE_TORCH_LIBRARY_IMPL(acgkd_fast, CPU, m) { m.impl("candidate_gradient", TORCH_BOX(&candidate_gradient)); }

}  // namespace acgkd
