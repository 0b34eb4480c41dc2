// candidate_gradient: <left_r, right_c> of every candidate pair, a masked product of dense matrices per graph.
#include <algorithm>
#include <vector>

#include "cpu/pairs.h"
#include "cpu/simd.h"

namespace acgkd {
namespace {

// Columns whose transposed features one sweep keeps in the first-level cache, and rows that share their loads.
template <typename Real>
constexpr int kColumns = 2 * kWidth<Real>;
constexpr int kRows = 2;

// Features of `count` consecutive nodes, channel by channel; missing nodes read as zeros.
template <typename Stored, typename Real>
void transpose(const Stored* x, int count, int64_t width, Real* to) {
  for (int64_t k = 0; k < width; ++k) {
    for (int i = 0; i < kColumns<Real>; ++i) {
      to[k * kColumns<Real> + i] = i < count ? static_cast<Real>(x[i * width + k]) : Real(0);
    }
  }
}

// up[r][i] = <left_i, right_row(r)>, down[r][i] = <left_row(r), right_i>.
template <typename Stored, typename Real>
ACGKD_SHARED void products(const Stored* const* left_rows, const Stored* const* right_rows, const Real* left,
                           const Real* right, int64_t width, Real* up, Real* down) {
  constexpr int kVectors = kColumns<Real> / kWidth<Real>;
  Vec<Real> ups[kRows][kVectors] = {}, downs[kRows][kVectors] = {};
  for (int64_t k = 0; k < width; ++k) {
    Vec<Real> l[kVectors], r[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      l[v] = load(left + k * kColumns<Real> + v * kWidth<Real>);
      r[v] = load(right + k * kColumns<Real> + v * kWidth<Real>);
    }
    for (int row = 0; row < kRows; ++row) {
      const Real left_value = static_cast<Real>(left_rows[row][k]);
      const Real right_value = static_cast<Real>(right_rows[row][k]);
      for (int v = 0; v < kVectors; ++v) {
        ups[row][v] += l[v] * right_value;
        downs[row][v] += r[v] * left_value;
      }
    }
  }
  std::memcpy(up, ups, sizeof ups);
  std::memcpy(down, downs, sizeof downs);
}

template <typename Stored, typename Real>
ACGKD_SHARED Real dot(const Stored* a, const Stored* b, int64_t width) {
  Vec<Real> total = {};
  int64_t k = 0;
  for (; k + kWidth<Real> <= width; k += kWidth<Real>) total += load(a + k) * load(b + k);
  Real rest = 0;
  for (; k < width; ++k) rest += static_cast<Real>(a[k]) * static_cast<Real>(b[k]);
  return sum<Real>(total) + rest;
}

#define ACGKD_FOR_TYPE(Stored)                                                                                    \
  ACGKD_CLONES static void products_of(const Stored* const* left_rows, const Stored* const* right_rows,           \
                                       const WideOf<Stored>* left, const WideOf<Stored>* right, int64_t width,     \
                                       WideOf<Stored>* up, WideOf<Stored>* down) {                                 \
    products(left_rows, right_rows, left, right, width, up, down);                                                 \
  }                                                                                                               \
  ACGKD_CLONES static WideOf<Stored> dot_of(const Stored* a, const Stored* b, int64_t width) {                     \
    return dot<Stored, WideOf<Stored>>(a, b, width);                                                               \
  }
ACGKD_FOR_TYPE(float)
ACGKD_FOR_TYPE(double)
ACGKD_FOR_TYPE(BFloat16)

template <typename Stored>
struct Task {
  using Real = WideOf<Stored>;
  const Stored *left, *right, *node_term;
  int64_t width;
  bool directed;
  Stored* out;

  // Gradients of the two directions between local nodes low < high of a graph; undirected pairs get their sum.
  void put(const GraphLayout& graph, int64_t undirected, int64_t low, int64_t high, Real up, Real down) const {
    up += static_cast<Real>(node_term[graph.first_node + low]);
    down += static_cast<Real>(node_term[graph.first_node + high]);
    Stored* to = out + graph.first_pair;
    if (directed) {
      to[2 * undirected] = static_cast<Stored>(up);
      to[2 * undirected + 1] = static_cast<Stored>(down);
    } else {
      to[undirected] = static_cast<Stored>(up + down);
    }
  }

  // All pairs of a complete graph whose smaller node is in first .. first + kColumns - 1.
  void complete_columns(const GraphLayout& graph, int64_t first) const {
    constexpr int kCount = kColumns<Real>;
    const int64_t n = graph.num_nodes;
    const Stored *l = left + graph.first_node * width, *r = right + graph.first_node * width;
    const int count = static_cast<int>(std::min<int64_t>(kCount, n - first));
    std::vector<Real> panel(2 * kCount * width);
    Real *left_panel = panel.data(), *right_panel = left_panel + kCount * width;
    transpose(l + first * width, count, width, left_panel);
    transpose(r + first * width, count, width, right_panel);
    Real up[kRows * kCount], down[kRows * kCount];
    for (int64_t high = first + 1; high < n; high += kRows) {
      const Stored *left_rows[kRows], *right_rows[kRows];
      for (int row = 0; row < kRows; ++row) {
        const int64_t node = std::min(high + row, n - 1);
        left_rows[row] = l + node * width, right_rows[row] = r + node * width;
      }
      products_of(left_rows, right_rows, left_panel, right_panel, width, up, down);
      for (int row = 0; row < kRows && high + row < n; ++row) {
        const int64_t node = high + row, end = std::min<int64_t>(count, node - first);
        for (int64_t i = 0; i < end; ++i) {
          put(graph, triangle(node) + first + i, first + i, node, up[row * kCount + i], down[row * kCount + i]);
        }
      }
    }
  }

  void ring_pairs(const GraphLayout& graph, int64_t begin, int64_t end) const {
    for (int64_t pair = begin; pair < end; ++pair) {
      const NodePair nodes = pair_nodes(pair, graph.num_nodes, kBudget);
      const int64_t low = (graph.first_node + nodes.row) * width, high = (graph.first_node + nodes.col) * width;
      put(graph, pair, nodes.row, nodes.col, dot_of(left + low, right + high, width),
          dot_of(left + high, right + low, width));
    }
  }
};

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
    const bool directed = kind & kDirected;
    const Task<Stored> task{read<Stored>(left), read<Stored>(right), read<Stored>(node_term),
                            left.size(1),       directed,            write<Stored>(grad)};
    // Columns of a complete graph, or pairs of a ring; begin .. end - 1 of one graph each.
    std::vector<PairRange> parts;
    const int64_t step = kind & kBudget ? 1024 : kColumns<WideOf<Stored>>;
    for (int64_t g = 0; g < layouts.num_graphs; ++g) {
      const int64_t total = kind & kBudget ? layouts[g].num_pairs / (directed ? 2 : 1) : layouts[g].num_nodes;
      for (int64_t begin = 0; begin < total; begin += step) parts.push_back({g, begin, std::min(total, begin + step)});
    }
    const int64_t count = static_cast<int64_t>(parts.size());
    const int64_t work = std::max<int64_t>(1, num_pairs * left.size(1));
    torch::stable::parallel_for(0, count, std::max<int64_t>(1, (count << 17) / work), [&](int64_t first, int64_t last) {
      for (int64_t p = first; p < last; ++p) {
        const GraphLayout graph = layouts[parts[p].graph];
        if (kind & kBudget) task.ring_pairs(graph, parts[p].begin, parts[p].end);
        else task.complete_columns(graph, parts[p].begin);
      }
    });
  });
  return grad;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(acgkd_fast, CPU, m) { m.impl("candidate_gradient", TORCH_BOX(&candidate_gradient)); }

}  // namespace acgkd
