// Which edit a graph is tried with; the rules of acgkd_fast/distill/moves.py.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "cpu/tensors.h"

namespace acgkd {

class SearchGraph;

// Numbers as in acgkd_fast/distill/moves.py.
enum class Move : int { kRelabel = 0, kRewire = 1, kAdd = 2, kDelete = 3, kSwap = 4 };
enum Lane : int { kChoice = 0, kKind = 1, kFirst = 2, kSecond = 3, kEnd = 4, kAccept = 5, kNear = 6 };
// Uniforms of one candidate: two counters of four words.
constexpr int kLanes = 8;

// An undirected edge, low < high.
struct Edge {
  int32_t low, high;

  bool ends_in(int64_t node) const { return node == low || node == high; }
};

inline Edge edge_of(int64_t one, int64_t two) {
  return {static_cast<int32_t>(std::min(one, two)), static_cast<int32_t>(std::max(one, two))};
}

struct Edit {
  Move kind;
  bool valid = false;
  // Positions in the edge list, and the edges that go from there and come there: one of each, or none, or two (swap).
  int64_t slot[2] = {};
  Edge old[2]{}, fresh[2]{};
  int num_old = 0, num_fresh = 0;
  int64_t node = 0, label_before = 0, label_after = 0;
};

struct ProposalRules {
  // u below the first relabels, below the second rewires, below the third adds, else deletes.
  double below_relabel, below_rewire, below_add, two_hop;
  bool keep_degrees, connected;
  int64_t max_degree, num_labels;
};

// Weights of the candidate pairs of all graphs, and their cumulative sums with a zero in front.
struct PairWeights {
  Layouts layouts;
  const double *weight, *cumulative;
};

// Scratch memory of one thread, for graphs of `max_nodes` at most.
struct ProposalScratch {
  explicit ProposalScratch(int64_t max_nodes) : marks(max_nodes), share(max_nodes), stack(max_nodes) {}

  std::vector<uint8_t> marks;
  std::vector<double> share;
  std::vector<int32_t> stack;
};

class Proposer {
 public:
  Proposer(const ProposalRules& rules, std::optional<PairWeights> weights) : rules_(rules), weights_(weights) {}

  bool keeps_connected() const { return rules_.connected; }

  // One edit of graph number `place`; connectivity is left to the caller.
  Edit propose(const SearchGraph& graph, int64_t place, const double* uniforms, ProposalScratch& scratch) const;

  // Log of the chance of the way back over that of the edit, which the graph has already undergone.
  double log_ratio(const SearchGraph& graph, int64_t place, const Edit& edit, ProposalScratch& scratch) const;

 private:
  struct Chances {
    double near, far;
  };

  void draw_ends(const SearchGraph& graph, int64_t place, const double* uniforms, int64_t node, const Edit& edit,
                 ProposalScratch& scratch, int64_t* one, int64_t* two) const;
  void propose_swap(const SearchGraph& graph, const double* uniforms, Edit& edit) const;
  double pair_weight(int64_t place, int64_t one, int64_t two) const;
  double shares(const SearchGraph& graph, int64_t place, int64_t node, int64_t gone, int64_t without, bool near,
                ProposalScratch& scratch) const;
  Chances partner_chances(const SearchGraph& graph, int64_t place, int64_t node, int64_t partner, int64_t gone,
                          int64_t without, ProposalScratch& scratch) const;

  const ProposalRules rules_;
  const std::optional<PairWeights> weights_;
};

}  // namespace acgkd
