// One graph of the search: its edges, and the teacher's features of all its nodes in all layers.
#pragma once

#include <cstdint>
#include <limits>
#include <vector>

#include "cpu/search_network.h"
#include "cpu/search_proposal.h"
#include "cpu/search_rows.h"

namespace acgkd {

constexpr int32_t kClean = std::numeric_limits<int32_t>::max();

// Change of a graph's moment sums, [norms, 2, stride] in double, and where its loss stands afterwards.
struct Scores {
  std::vector<double> change;
  double loss = 0;
  bool hit = false;
};

// Scratch memory of one thread.
struct Workspace {
  Workspace(const Network& network, int64_t max_nodes);

  Scores scores;
  ProposalScratch proposal;
  std::vector<float> weights;
  std::vector<const float*> inputs;
  std::vector<float*> outputs;
  std::vector<const float*> neighbours;
  std::vector<Activation> activations;
  AlignedFloats hidden, pooled, zeros;
  // Rows that the latest edit changes, [planes, max_nodes, stride]: most edits are dropped, and then the graph's own
  // rows have not been touched.
  int64_t max_nodes;
  AlignedFloats fresh;
};

class SearchGraph {
 public:
  // `x` holds one row of features per node; `label` their labels where those are free, else null.
  SearchGraph(const Network& network, int64_t nodes, std::vector<Edge> edges, const float* x, const int64_t* label,
              int64_t target);

  // Edges and labels as after an edit. `reach` then finds the rows that it changes, `evaluate` computes them, and
  // `keep` may follow; else `revert`.
  void carry_out(const Edit& edit);
  void reach(const Edit& edit);
  // Asks for the rows that `evaluate` is going to read, so that they are there when it starts.
  void prefetch() const;
  void evaluate(Workspace& work);
  void keep(const Workspace& work);
  void revert(const Edit& edit);

  // Everything anew from edges and labels; the scores hold the sums themselves.
  void rebuild(Workspace& work);
  void restore(const std::vector<Edge>& edges, const std::vector<int64_t>& label, Workspace& work);

  int64_t nodes() const { return nodes_; }
  const std::vector<Edge>& edges() const { return edges_; }
  const std::vector<int64_t>& label() const { return label_; }

  int64_t degree(int64_t node) const { return static_cast<int64_t>(neighbours_[node].size()); }
  bool adjacent(int64_t a, int64_t b) const;
  bool connected(ProposalScratch& scratch) const;
  // marks[k] = whether node k is at distance two of `node`, the edge between it and `without` thought away.
  void mark_distance_two(int64_t node, int64_t without, uint8_t* marks) const;

 private:
  float* resident(int64_t plane, int64_t node) const { return features_.get() + (plane * nodes_ + node) * stride_; }
  // The row as the latest edit leaves it.
  float* row(int64_t plane, int64_t level, int64_t node, const Workspace& work) const {
    const int64_t place = place_[node];
    return place < count_[level] ? work.fresh.get() + (plane * work.max_nodes + place) * stride_
                                 : resident(plane, node);
  }
  int64_t planes() const { return (network_.gin ? 4 : 3) * depth_; }
  int64_t transform_plane(int64_t layer) const { return layer; }
  int64_t aggregate_plane(int64_t layer) const { return depth_ + layer; }
  int64_t output_plane(int64_t layer) const { return 2 * depth_ + layer; }
  int64_t second_plane(int64_t layer) const { return 3 * depth_ + layer; }

  void link(Edge edge, bool present);
  void mark(int64_t node);
  void mark_neighbours(int64_t node);
  void mark_rewired(const Edit& edit);
  void input_rows(Workspace& work);
  // `anew`: there are no earlier rows to take the difference from.
  void compute(bool anew, Workspace& work);
  void layer_rows(int64_t layer, bool anew, Workspace& work);
  void classify(Workspace& work);

  const Network& network_;
  int64_t nodes_, stride_, depth_, target_;
  const float* x_;
  std::vector<Edge> edges_;
  std::vector<int64_t> label_;
  // Ascending, so that sums over neighbours do not depend on the history of the graph.
  std::vector<std::vector<int32_t>> neighbours_;
  // (degree + 1)^-1/2.
  std::vector<float> degree_scale_;
  AlignedFloats features_;
  // Rows that the latest edit changed, in the order of their distance. Level 0 is the transformed input, level l + 1
  // everything that layer l computes and the transform of the next: it has the first count_[level] of the rows.
  std::vector<int32_t> dirty_;
  std::vector<int64_t> count_;
  // Where a node stands in that order.
  std::vector<int32_t> place_;
};

}  // namespace acgkd
