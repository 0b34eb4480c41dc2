// Which edit a graph is tried with: the rules of acgkd_fast/distill/moves.py, by a warp. See "Proposals and
// constraints" in docs/search.md and csrc/cpu/search_proposal.cpp.
#pragma once

#include "../layout.h"
#include "search_graph.h"

namespace acgkd_fast::cuda::search {

// kPlain: new edges are uniform, which leaves most of the code and its registers out.
template <bool kShared, bool kPlain>
struct Proposer {
  const Graph<kShared>& g;
  const Rules& rules;

  __device__ explicit Proposer(const Graph<kShared>& graph) : g(graph), rules(graph.job.rules) {}

  __device__ __forceinline__ static int index(double u, int n) { return static_cast<int>(u * static_cast<double>(n)); }
  __device__ __forceinline__ static Edge edge_of(int one, int two) { return {min(one, two), max(one, two)}; }
  __device__ __forceinline__ static Edge edge_at(const int64_t* pairs, int slot) {
    return {static_cast<int>(pairs[slot] >> 32), static_cast<int>(pairs[slot] & 0xffffffff)};
  }
  __device__ __forceinline__ acgkd::GraphLayout layout() const {
    return acgkd::graph_layout(rules.table, g.job.pool.graphs, g.graph);
  }
  __device__ __forceinline__ double pair_weight(int one, int two) const {
    const int64_t pair = acgkd::pair_number(one, two, layout(), rules.kind);
    return pair < 0 ? 0.0 : rules.weight[pair];
  }

  // Nodes 32 w .. 32 w + 31 at distance two of a node once its edge with `without` is thought away.
  __device__ unsigned distance_two(int node, int without, int w) const {
    unsigned far = 0u, near = g.adjacency[node * g.words + w];
    for (int v = 0; v < g.words; ++v) {
      for (unsigned bits = g.adjacency[node * g.words + v]; bits != 0u; bits &= bits - 1) {
        const int other = 32 * v + __ffs(static_cast<int>(bits)) - 1;
        if (other != without) {
          far |= g.adjacency[other * g.words + w];
        }
      }
    }
    if (without >= 0 && without / 32 == w) {
      near &= ~(1u << (without % 32));
    }
    if (node / 32 == w) {
      near |= 1u << (node % 32);
    }
    return far & ~near;
  }

  // What the nodes count for as partners of one: all others, or those at distance two without `gone`.
  struct Shares {
    double total;
    double one;   // of the partner asked for
    int partner;  // first node at which the running sum exceeds `above`, at most the last; nodes - 1 where none does
  };

  // Sums run in the order of the nodes: every lane has the same.
  __device__ Shares walk(int node, int gone, int without, bool near, int asked, double above) const {
    const int lane = static_cast<int>(threadIdx.x);
    Shares found{0.0, 0.0, -1};
    for (int w = 0; w < g.words; ++w) {
      const int other = 32 * w + lane;
      bool in = other < g.nodes && other != node;
      if (near) {
        in = in && other != gone && (distance_two(node, without, w) >> lane & 1u) != 0;
      }
      double share = 0.0;
      if (in) {
        share = rules.weight == nullptr ? 1.0 : pair_weight(node, other);
      }
      for (unsigned left = __ballot_sync(kAllLanes, share != 0.0); left != 0u; left &= left - 1) {
        const int at = __ffs(static_cast<int>(left)) - 1;
        const double one = __shfl_sync(kAllLanes, share, at);
        found.total += one;
        found.one = 32 * w + at == asked ? one : found.one;
        found.partner = found.partner < 0 && found.total > above ? 32 * w + at : found.partner;
      }
    }
    found.partner = found.partner < 0 ? g.nodes - 1 : found.partner;
    return found;
  }

  // Equal ends stand for none.
  __device__ __forceinline__ Edge draw_ends(const double (&u)[4], const double (&v)[4], int node,
                                            const Edit& edit) const {
    const bool adds = edit.move == kAdd;
    const double first = u[2], second = u[3];
    const int gone = adds ? -1 : edit.old[0].low + edit.old[0].high - node;
    bool near = !kPlain && v[2] < rules.two_hop;
    double total = near ? walk(node, gone, gone, true, -1, 0.0).total : 0.0;
    if (kPlain || (total == 0.0 && rules.weight == nullptr)) {
      int two = index(second, g.nodes - (adds ? 1 : 2));
      two += two >= (adds ? node : edit.old[0].low);
      two += !adds && two >= edit.old[0].high;
      return {node, two};
    }
    if (adds && !near) {
      const acgkd::GraphLayout pairs = layout();
      const double* begin = rules.cumulative + pairs.first_pair;
      total = begin[pairs.num_pairs] - begin[0];
      if (!(total > 0.0)) {
        return {node, node};
      }
      // Two uniforms make one of 46 bits.
      const double target = begin[0] + __dmul_rn(first + (second - 0.5) / (1 << 23), total);
      int64_t low = 0, high = pairs.num_pairs + 1;
      while (low < high) {
        const int64_t middle = (low + high) / 2;
        const bool above = begin[middle] > target;
        low = above ? low : middle + 1;
        high = above ? middle : high;
      }
      const int64_t pair = low - 1 < 0 ? 0 : low - 1 < pairs.num_pairs ? low - 1 : pairs.num_pairs - 1;
      const acgkd::NodePair ends = acgkd::pair_nodes(pair, g.nodes, rules.kind);
      return {static_cast<int>(ends.row), static_cast<int>(ends.col)};
    }
    if (total == 0.0) {
      near = false;
      total = walk(node, gone, gone, false, -1, 0.0).total;
    }
    if (!(total > 0.0)) {
      return {node, node};
    }
    return {node, walk(node, gone, gone, near, -1, second * total).partner};
  }

  __device__ __forceinline__ void propose_swap(const double (&u)[4], double end, const int64_t* pairs,
                                               Edit& edit) const {
    const int edges = g.trial->count;
    edit.move = kSwap;
    if (edges < 2) {
      return;
    }
    edit.slot[0] = index(u[2], edges);
    edit.slot[1] = index(u[3], edges - 1);
    edit.slot[1] += edit.slot[1] >= edit.slot[0];
    const Edge a = edge_at(pairs, edit.slot[0]), b = edge_at(pairs, edit.slot[1]);
    if (a.ends_in(b.low) || a.ends_in(b.high)) {
      return;
    }
    const bool along = end < 0.5;
    edit.old[0] = a;
    edit.old[1] = b;
    edit.fresh[0] = edge_of(a.low, along ? b.low : b.high);
    edit.fresh[1] = edge_of(a.high, along ? b.high : b.low);
    edit.num_old = edit.num_fresh = 2;
    edit.valid = !g.adjacent(edit.fresh[0].low, edit.fresh[0].high) &&
                 !g.adjacent(edit.fresh[1].low, edit.fresh[1].high);
  }

  // Uniforms 0 .. 3 of a candidate in u, 4 .. 7 in v.
  __device__ __forceinline__ Edit propose(const double (&u)[4], const double (&v)[4], const int64_t* pairs) const {
    const int edges = g.trial->count;
    Edit edit{};
    edit.move = (u[1] >= rules.below_relabel) + (u[1] >= rules.below_rewire) + (u[1] >= rules.below_add);
    if (u[1] < rules.below_relabel) {
      edit.valid = rules.num_labels > 1;
      if (edit.valid) {
        edit.node = index(u[2], g.nodes);
        edit.label_before = g.label[edit.node];
        edit.label_after = (edit.label_before + 1 + index(u[3], rules.num_labels - 1)) % rules.num_labels;
      }
      return edit;
    }
    if (rules.keep_degrees) {
      propose_swap(u, v[0], pairs, edit);
      return edit;
    }
    const bool adds = edit.move == kAdd;
    int node = 0;
    if (adds) {
      if (g.nodes < 2) {
        return edit;
      }
      node = index(u[2], g.nodes);
      edit.slot[0] = edges;
    } else {
      if (edges == 0) {
        return edit;
      }
      edit.slot[0] = index(u[2], edges);
      edit.old[0] = edge_at(pairs, edit.slot[0]);
      edit.num_old = 1;
      if (edit.move == kDelete) {
        edit.valid = 1;
        return edit;
      }
      if (g.nodes < 3) {
        return edit;
      }
      node = v[0] < 0.5 ? edit.old[0].low : edit.old[0].high;
    }
    const Edge ends = draw_ends(u, v, node, edit);
    const bool crowded = rules.max_degree > 0 && ((adds && g.degree[ends.low] >= rules.max_degree) ||
                                                  g.degree[ends.high] >= rules.max_degree);
    edit.fresh[0] = edge_of(ends.low, ends.high);
    edit.num_fresh = 1;
    edit.valid = ends.low != ends.high && !g.adjacent(ends.low, ends.high) && !crowded;
    return edit;
  }

  struct Chances {
    double near, far;
  };

  __device__ Chances partner_chances(int node, int partner, int gone, int without) const {
    const int others = g.nodes - 1 - (gone >= 0);
    double far = 1.0 / static_cast<double>(others < 1 ? 1 : others);
    if (rules.weight != nullptr) {
      const Shares all = walk(node, gone, without, false, partner, 0.0);
      far = all.one / all.total;
    }
    const Shares near = walk(node, gone, without, true, partner, 0.0);
    return {near.total > 0.0 ? near.one / near.total : far, far};
  }

  // Log of the chance of the way back over that of the edit, which the graph has already undergone.
  __device__ double log_ratio(const Edit& edit) const {
    const double h = rules.two_hop;
    if (edit.move == kRewire) {
      if (kPlain || (rules.weight == nullptr && h == 0.0)) {
        return 0.0;
      }
      const Edge old = edit.old[0], fresh = edit.fresh[0];
      const int kept = fresh.ends_in(old.low) ? old.low : old.high;
      const int gone = old.low + old.high - kept, partner = fresh.low + fresh.high - kept;
      if (h == 0.0) {
        return log(pair_weight(kept, gone)) - log(pair_weight(kept, partner));
      }
      // The new edge is thought away: without it the graph is the same before and after.
      const Chances back = partner_chances(kept, gone, partner, partner);
      const Chances there = partner_chances(kept, partner, gone, partner);
      return log(__dmul_rn(h, back.near) + __dmul_rn(1.0 - h, back.far)) -
             log(__dmul_rn(h, there.near) + __dmul_rn(1.0 - h, there.far));
    }
    if (edit.move != kAdd && edit.move != kDelete) {
      return 0.0;
    }
    const bool adds = edit.move == kAdd;
    const Edge pair = adds ? edit.fresh[0] : edit.old[0];
    const double n = g.nodes, count = g.trial->count + (adds ? 1 : -1), pairs = n * (n - 1.0);
    double chance = 2.0 / (pairs < 1.0 ? 1.0 : pairs);
    if (!kPlain && rules.weight != nullptr) {
      const acgkd::GraphLayout here = layout();
      const double* begin = rules.cumulative + here.first_pair;
      chance = pair_weight(pair.low, pair.high) / (begin[here.num_pairs] - begin[0]);
    }
    if (!kPlain && h > 0.0) {
      const double low = partner_chances(pair.low, pair.high, -1, adds ? pair.high : -1).near;
      const double high = partner_chances(pair.high, pair.low, -1, adds ? pair.low : -1).near;
      chance = __dmul_rn(1.0 - h, chance) + __dmul_rn(h / n, low + high);
    }
    return adds ? -log(count * chance) : log((count + 1.0) * chance);
  }

  // Stores an edit and carries it out, unless it would leave a connected graph in parts that must stay whole.
  __device__ __forceinline__ bool carried_out(const Edit& edit) const {
    const bool first = threadIdx.x == 0;
    __syncwarp();
    if (first) {
      g.trial->edit = edit;
      // From memory: numbered members of one in registers would have to be spilled.
      g.carry_out(g.trial->edit, true);
    }
    __syncwarp();
    if (!rules.connected || edit.num_old == 0 || g.connected()) {
      return true;
    }
    __syncwarp();
    if (first) {
      g.carry_out(g.trial->edit, false);
    }
    __syncwarp();
    const bool was_connected = g.connected();
    __syncwarp();
    if (first && !was_connected) {
      g.carry_out(g.trial->edit, true);
    }
    __syncwarp();
    return !was_connected;
  }

  // Finds what is to be evaluated next in the round up to step `end` and carries it out: a candidate, or, where a step
  // has several, the best of them once more.
  __device__ void next_edit(int end, const int64_t* pairs) const {
    Trial& trial = *g.trial;
    const bool first = threadIdx.x == 0;
    int step = trial.step, candidate = trial.candidate;
    double best_delta = trial.best_delta;
    __syncwarp();
    for (; step < end; ++step, candidate = 0) {
      if (g.job.rounds.picked[static_cast<int64_t>(step) * g.job.pool.graphs + g.graph] == 0) {
        continue;
      }
      for (; candidate < rules.proposals; ++candidate) {
        double u[4], v[4];
        uniforms(g.job, g.graph, g.job.first_step + step, 2 * candidate, u);
        uniforms(g.job, g.graph, g.job.first_step + step, 2 * candidate + 1, v);
        const Edit edit = propose(u, v, pairs);
        if (!edit.valid || !carried_out(edit)) {
          continue;
        }
        double ratio = 0.0;
        if (g.job.temperature > 0.0) {
          ratio = log_ratio(trial.edit);
        }
        if (first) {
          trial.step = step;
          trial.candidate = candidate + 1;
          trial.retried = 0;
          trial.best_delta = best_delta;
          trial.accept_uniform = v[1];
          trial.log_ratio = ratio;
        }
        g.mark_reached();
        return;
      }
      if (best_delta < 0.0) {
        __syncwarp();
        if (first) {
          trial.edit = trial.best;
          trial.step = step + 1;
          trial.candidate = 0;
          trial.retried = 1;
          g.carry_out(trial.best, true);
        }
        __syncwarp();
        g.mark_reached();
        return;
      }
      best_delta = HUGE_VAL;
    }
    if (first) {
      trial.edit.valid = 0;
    }
  }
};

}  // namespace acgkd_fast::cuda::search
