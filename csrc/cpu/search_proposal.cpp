#include "cpu/search_proposal.h"

#include <algorithm>
#include <cmath>

#include "cpu/search_graph.h"

namespace acgkd {
namespace {

int64_t index(double u, int64_t n) { return static_cast<int64_t>(u * static_cast<double>(n)); }

}  // namespace

Edit Proposer::propose(const SearchGraph& graph, int64_t place, const double* uniforms,
                       ProposalScratch& scratch) const {
  const int64_t count = static_cast<int64_t>(graph.edges().size()), nodes = graph.nodes();
  const double kind = uniforms[kKind], first = uniforms[kFirst];
  Edit edit;
  edit.kind = static_cast<Move>((kind >= rules_.below_relabel) + (kind >= rules_.below_rewire) +
                                (kind >= rules_.below_add));
  if (kind < rules_.below_relabel) {
    edit.valid = rules_.num_labels > 1;
    if (!edit.valid) return edit;
    edit.node = index(first, nodes);
    edit.label_before = graph.label()[edit.node];
    edit.label_after =
        (edit.label_before + 1 + index(uniforms[kSecond], rules_.num_labels - 1)) % rules_.num_labels;
    return edit;
  }
  if (rules_.keep_degrees) {
    propose_swap(graph, uniforms, edit);
    return edit;
  }
  int64_t one, two, node;
  if (edit.kind == Move::kAdd) {
    if (nodes < 2) return edit;
    node = index(first, nodes);
    edit.slot[0] = count;
  } else {
    if (count == 0) return edit;
    edit.slot[0] = index(first, count);
    edit.old[0] = graph.edges()[edit.slot[0]];
    edit.num_old = 1;
    if (edit.kind == Move::kDelete) {
      edit.valid = true;
      return edit;
    }
    if (nodes < 3) return edit;
    node = uniforms[kEnd] < 0.5 ? edit.old[0].low : edit.old[0].high;
  }
  draw_ends(graph, place, uniforms, node, edit, scratch, &one, &two);
  if (one == two || graph.adjacent(one, two)) return edit;
  if (rules_.max_degree > 0) {
    if (edit.kind == Move::kAdd && graph.degree(one) >= rules_.max_degree) return edit;
    if (graph.degree(two) >= rules_.max_degree) return edit;
  }
  edit.fresh[0] = edge_of(one, two);
  edit.num_fresh = 1;
  edit.valid = true;
  return edit;
}

// Equal ends stand for none.
void Proposer::draw_ends(const SearchGraph& graph, int64_t place, const double* uniforms, int64_t node,
                         const Edit& edit, ProposalScratch& scratch, int64_t* one, int64_t* two) const {
  const int64_t nodes = graph.nodes();
  const bool adds = edit.kind == Move::kAdd, near = uniforms[kNear] < rules_.two_hop;
  const double first = uniforms[kFirst], second = uniforms[kSecond];
  const int64_t gone = adds ? -1 : edit.old[0].low + edit.old[0].high - node;
  *one = *two = node;
  double total = near ? shares(graph, place, node, gone, gone, true, scratch) : 0.0;
  if (total == 0.0 && !weights_) {
    *two = index(second, nodes - (adds ? 1 : 2));
    *two += *two >= (adds ? node : edit.old[0].low);
    if (!adds) *two += *two >= edit.old[0].high;
    return;
  }
  if (adds && !near) {
    const GraphLayout layout = weights_->layouts[place];
    const double* begin = weights_->cumulative + layout.first_pair;
    total = begin[layout.num_pairs] - begin[0];
    if (!(total > 0.0)) return;
    // Two uniforms make one of 46 bits.
    const double target = begin[0] + (first + (second - 0.5) / (1 << 23)) * total;
    const int64_t pair = std::upper_bound(begin, begin + layout.num_pairs + 1, target) - begin - 1;
    const NodePair ends =
        pair_nodes(std::clamp<int64_t>(pair, 0, layout.num_pairs - 1), nodes, weights_->layouts.kind);
    *one = ends.row;
    *two = ends.col;
    return;
  }
  if (total == 0.0) total = shares(graph, place, node, gone, gone, false, scratch);
  if (!(total > 0.0)) return;
  double sum = 0;
  for (*two = 0; *two < nodes - 1; ++*two) {
    sum += scratch.share[*two];
    if (sum > second * total) return;
  }
}

// A pair of edges {a < b}, {c < d} becomes {a, c}, {b, d} or {a, d}, {b, c}.
void Proposer::propose_swap(const SearchGraph& graph, const double* uniforms, Edit& edit) const {
  const int64_t count = static_cast<int64_t>(graph.edges().size());
  edit.kind = Move::kSwap;
  if (count < 2) return;
  edit.slot[0] = index(uniforms[kFirst], count);
  edit.slot[1] = index(uniforms[kSecond], count - 1);
  edit.slot[1] += edit.slot[1] >= edit.slot[0];
  const Edge a = edit.old[0] = graph.edges()[edit.slot[0]], b = edit.old[1] = graph.edges()[edit.slot[1]];
  if (a.ends_in(b.low) || a.ends_in(b.high)) return;
  const bool along = uniforms[kEnd] < 0.5;
  edit.fresh[0] = edge_of(a.low, along ? b.low : b.high);
  edit.fresh[1] = edge_of(a.high, along ? b.high : b.low);
  edit.num_old = edit.num_fresh = 2;
  edit.valid = !graph.adjacent(edit.fresh[0].low, edit.fresh[0].high) &&
               !graph.adjacent(edit.fresh[1].low, edit.fresh[1].high);
}

double Proposer::pair_weight(int64_t place, int64_t one, int64_t two) const {
  const int64_t pair = pair_number(one, two, weights_->layouts[place], weights_->layouts.kind);
  return pair < 0 ? 0.0 : weights_->weight[pair];
}

// What each node counts for as partner of `node`, all or only those at distance two of it, once the edge between it
// and `without` is thought away; -1 for none. Returns their sum.
double Proposer::shares(const SearchGraph& graph, int64_t place, int64_t node, int64_t gone, int64_t without,
                        bool near, ProposalScratch& scratch) const {
  if (near) {
    graph.mark_distance_two(node, without, scratch.marks.data());
    if (gone >= 0) scratch.marks[gone] = 0;
  }
  double total = 0;
  for (int64_t other = 0; other < graph.nodes(); ++other) {
    const bool in = near ? scratch.marks[other] : other != node;
    scratch.share[other] = !in ? 0.0 : weights_ ? pair_weight(place, node, other) : 1.0;
    total += scratch.share[other];
  }
  return total;
}

Proposer::Chances Proposer::partner_chances(const SearchGraph& graph, int64_t place, int64_t node, int64_t partner,
                                            int64_t gone, int64_t without, ProposalScratch& scratch) const {
  double far = 1.0 / static_cast<double>(std::max<int64_t>(graph.nodes() - 1 - (gone >= 0), 1));
  if (weights_) {
    const double all = shares(graph, place, node, gone, without, false, scratch);
    far = scratch.share[partner] / all;
  }
  const double total = shares(graph, place, node, gone, without, true, scratch);
  return {total > 0.0 ? scratch.share[partner] / total : far, far};
}

double Proposer::log_ratio(const SearchGraph& graph, int64_t place, const Edit& edit,
                           ProposalScratch& scratch) const {
  const double h = rules_.two_hop;
  if (edit.kind == Move::kRewire) {
    if (!weights_ && h == 0.0) return 0.0;
    const Edge old = edit.old[0], fresh = edit.fresh[0];
    const int64_t kept = fresh.ends_in(old.low) ? old.low : old.high;
    const int64_t gone = old.low + old.high - kept, partner = fresh.low + fresh.high - kept;
    if (h == 0.0) return std::log(pair_weight(place, kept, gone)) - std::log(pair_weight(place, kept, partner));
    // The new edge is thought away: without it the graph is the same before and after.
    const Chances back = partner_chances(graph, place, kept, gone, partner, partner, scratch);
    const Chances there = partner_chances(graph, place, kept, partner, gone, partner, scratch);
    return std::log(h * back.near + (1.0 - h) * back.far) - std::log(h * there.near + (1.0 - h) * there.far);
  }
  if (edit.kind != Move::kAdd && edit.kind != Move::kDelete) return 0.0;
  const bool adds = edit.kind == Move::kAdd;
  const Edge pair = adds ? edit.fresh[0] : edit.old[0];
  const double n = static_cast<double>(graph.nodes()), count = static_cast<double>(graph.edges().size());
  double chance = 2.0 / std::max(n * (n - 1.0), 1.0);
  if (weights_) {
    const GraphLayout layout = weights_->layouts[place];
    const double* begin = weights_->cumulative + layout.first_pair;
    chance = pair_weight(place, pair.low, pair.high) / (begin[layout.num_pairs] - begin[0]);
  }
  if (h > 0.0) {
    const double low = partner_chances(graph, place, pair.low, pair.high, -1, adds ? pair.high : -1, scratch).near;
    const double high = partner_chances(graph, place, pair.high, pair.low, -1, adds ? pair.low : -1, scratch).near;
    chance = (1.0 - h) * chance + h / n * (low + high);
  }
  return adds ? -std::log(count * chance) : std::log((count + 1.0) * chance);
}

}  // namespace acgkd
