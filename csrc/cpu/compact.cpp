// From drawn pairs to canonical CSR, without sorting.
#include "cpu/compact.h"

#include <algorithm>
#include <limits>

namespace acgkd {
namespace {

// Node pairs of ascending pair numbers of one graph, without a division or root per pair.
class PairWalk {
 public:
  PairWalk(const GraphLayout& graph, int64_t kind) : n_(graph.num_nodes), kind_(kind) {}

  // Local nodes; `local` must not be smaller than in the call before.
  NodePair at(int64_t local) {
    const bool swapped = (kind_ & kDirected) && (local & 1);
    if (kind_ & kDirected) local >>= 1;
    int64_t low, high;
    if (kind_ & kBudget) {
      if (local >= next_) band_ = local / n_, next_ = (band_ + 1) * n_;
      const int64_t start = local - (next_ - n_), ahead = start + band_ + 1;
      const int64_t end = ahead < n_ ? ahead : ahead - n_;
      low = std::min(start, end), high = std::max(start, end);
    } else {
      while (local >= next_) next_ += ++high_;
      high = high_, low = local - (next_ - high_);
    }
    if (swapped) return {high, low};
    return {low, high};
  }

 private:
  int64_t n_, kind_;
  int64_t band_ = 0, high_ = 0, next_ = 0;
};

template <typename Stored>
class RowFill {
  using Real = WideOf<Stored>;

 public:
  RowFill(const Layouts& layouts, const Drawn<Real>& drawn) : layouts_(layouts), drawn_(drawn) {}

  // Fills rowptr and returns the number of edges.
  int64_t count(int32_t* rowptr) {
    const int64_t nodes = layouts_.num_nodes;
    std::fill_n(rowptr, nodes + 1, 0);
    for_graphs([&](int64_t g) {
      int32_t* counts = rowptr + 1 + layouts_[g].first_node;
      const bool both = !(layouts_.kind & kDirected);
      visit(g, [&](NodePair pair, int64_t, Real) {
        ++counts[pair.row];
        if (both) ++counts[pair.col];
      });
    });
    int64_t total = 0;
    for (int64_t node = 1; node <= nodes; ++node) {
      total += rowptr[node];
      rowptr[node] = static_cast<int32_t>(total);
    }
    return total;
  }

  void fill(const int32_t* rowptr, int32_t* col, int64_t* pair, Stored* value) {
    std::vector<int32_t> cursor(rowptr, rowptr + layouts_.num_nodes);
    const auto put = [=, c = cursor.data()](int64_t row, int64_t column, int64_t p, Real v) {
      const int32_t at = c[row]++;
      col[at] = static_cast<int32_t>(column);
      pair[at] = p;
      value[at] = static_cast<Stored>(v);
    };
    for_graphs([&](int64_t g) {
      const GraphLayout graph = layouts_[g];
      if (layouts_.kind & kBudget) {
        fill_ring(g, graph, rowptr, put);
      } else {
        // In (high, low) order a row meets its smaller partners first, each group in ascending order.
        visit(g, [&](NodePair nodes, int64_t p, Real v) {
          const int64_t row = nodes.row + graph.first_node, column = nodes.col + graph.first_node;
          put(row, column, p, v);
          if (!(layouts_.kind & kDirected)) put(column, row, p, v);
        });
      }
    });
  }

 private:
  template <typename Function>
  void for_graphs(const Function& function) {
    const int64_t graphs = layouts_.num_graphs;
    const int64_t grain = std::max<int64_t>(1, kRangePairs * graphs / std::max<int64_t>(1, layouts_.num_pairs));
    torch::stable::parallel_for(0, graphs, grain, [&](int64_t begin, int64_t end) {
      for (int64_t g = begin; g < end; ++g) function(g);
    });
  }

  // Calls function(local nodes, pair number in the batch, value) for each hit of a graph in ascending order.
  template <typename Function>
  void visit(int64_t g, const Function& function) const {
    const GraphLayout graph = layouts_[g];
    PairWalk walk(graph, layouts_.kind);
    for (int64_t p = drawn_.piece_ptr[g]; p < drawn_.piece_ptr[g + 1]; ++p) {
      const Piece& piece = drawn_.pieces[p];
      const Hits<Real>& hits = drawn_.chunks[piece.chunk];
      for (int64_t i = piece.hits_begin; i < piece.hits_end; ++i) {
        function(walk.at(hits.pair(i)), graph.first_pair + hits.pair(i), hits.value(i));
      }
    }
  }

  // On a ring, pair order is not row order: bucket the entries by column, then hand the columns out in order.
  template <typename Put>
  void fill_ring(int64_t g, const GraphLayout& graph, const int32_t* rowptr, const Put& put) const {
    struct Entry {
      int32_t row;
      int64_t pair;
      Real value;
    };
    const bool directed = layouts_.kind & kDirected;
    std::vector<int32_t> start(graph.num_nodes + 1, 0);
    visit(g, [&](NodePair nodes, int64_t, Real) {
      ++start[nodes.col + 1];
      if (!directed) ++start[nodes.row + 1];
    });
    for (int64_t node = 0; node < graph.num_nodes; ++node) start[node + 1] += start[node];
    std::vector<Entry> entries(start[graph.num_nodes]);
    std::vector<int32_t> next(start.begin(), start.end() - 1);
    visit(g, [&](NodePair nodes, int64_t p, Real v) {
      entries[next[nodes.col]++] = {static_cast<int32_t>(nodes.row), p, v};
      if (!directed) entries[next[nodes.row]++] = {static_cast<int32_t>(nodes.col), p, v};
    });
    for (int64_t column = 0; column < graph.num_nodes; ++column) {
      for (int32_t e = start[column]; e < start[column + 1]; ++e) {
        put(entries[e].row + graph.first_node, column + graph.first_node, entries[e].pair, entries[e].value);
      }
    }
  }

  const Layouts& layouts_;
  const Drawn<Real>& drawn_;
};

}  // namespace

template <typename Stored>
SampleTensors compact(const char* op, const Layouts& layouts, const Drawn<WideOf<Stored>>& drawn, const Tensor& like,
                      const Tensor& table, int64_t capacity) {
  const int64_t num_nodes = layouts.num_nodes;
  RowFill<Stored> rows(layouts, drawn);
  const Tensor rowptr = new_tensor(table, {num_nodes + 1}, ScalarType::Int);
  const int64_t total = rows.count(write<int32_t>(rowptr));
  STD_TORCH_CHECK(total <= std::numeric_limits<int32_t>::max(), op, ": logits: expected at most 2^31 - 1 edges, got ",
                  total);
  const int64_t length = capacity >= 0 ? capacity : total;
  const Tensor value = new_tensor(like, {length}, like.scalar_type());
  const Tensor col = new_tensor(table, {length}, ScalarType::Int);
  const Tensor pair = new_tensor(table, {length}, ScalarType::Long);
  const Tensor needed = new_tensor(table, {1}, ScalarType::Long);
  *write<int64_t>(needed) = total;
  const int64_t stored = total <= length ? total : 0;
  if (stored == total) {
    rows.fill(read<int32_t>(rowptr), write<int32_t>(col), write<int64_t>(pair), write<Stored>(value));
  } else {
    std::fill_n(write<int32_t>(rowptr), num_nodes + 1, 0);
  }
  std::fill(write<int32_t>(col) + stored, write<int32_t>(col) + length, 0);
  std::fill(write<int64_t>(pair) + stored, write<int64_t>(pair) + length, -1);
  std::fill(write<Stored>(value) + stored, write<Stored>(value) + length, Stored(0));
  return {value, rowptr, col, pair, needed};
}

#define ACGKD_FOR_TYPE(Stored)                                                                                  \
  template SampleTensors compact<Stored>(const char*, const Layouts&, const Drawn<WideOf<Stored>>&, const Tensor&, \
                                         const Tensor&, int64_t);
ACGKD_FOR_TYPE(float)
ACGKD_FOR_TYPE(double)
ACGKD_FOR_TYPE(BFloat16)

}  // namespace acgkd
