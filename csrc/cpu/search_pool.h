// The pool's steps: which graphs are edited, what passes, and what is taken back; see acgkd_fast/search/api.py.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <iterator>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "cpu/search_energy.h"
#include "cpu/search_graph.h"
#include "cpu/search_proposal.h"
#include "cpu/search_rows.h"

namespace acgkd {

// As in acgkd_fast/distill/refiner.py.
constexpr int64_t kCheckEvery = 10;
constexpr uint32_t kProposalStream = 3;

struct Settings {
  int64_t steps, interval, edited, min_steps, proposals;
  double temperature, stop_k;
};

// What one graph did since the pool's statistics were last looked at.
struct Trial {
  std::vector<int64_t> steps;
  std::vector<double> change;
  double delta = 0, excess_change = 0, loss = 0;
  bool hit = false;
  int64_t accepted = 0;
  std::vector<Edge> edges_before;
  std::vector<int64_t> label_before;
};

// An edit that its graph has undergone, whose rows are known but not computed; not valid if there is nothing to try.
struct Attempt {
  Edit edit;
  double accept = 0;
};

// One of the edits among which a step chooses.
struct Candidate {
  Edit edit;
  double delta = HUGE_VAL, excess_change = 0, accept = 0;
  int64_t number = -1;
};

// The threads take items from one counter, so that graphs of unlike cost keep all of them busy. What an item does
// may not depend on the thread.
template <typename Function>
void for_items(int64_t count, const Function& function) {
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, count, 1, [&](int64_t, int64_t) { function(next, count); });
}

// Scratch memory kept from round to round: fresh pages would cost as much as some edits.
class Workspaces {
 public:
  explicit Workspaces(const Network& network) : network_(network) {}

  void set_max_nodes(int64_t max_nodes) { max_nodes_ = max_nodes; }

  // One that no other thread has; comes back by itself.
  auto take() {
    const auto give_back = [this](Workspace* work) {
      const std::lock_guard<std::mutex> lock(mutex_);
      idle_.emplace_back(work);
    };
    std::unique_ptr<Workspace> work;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (!idle_.empty()) {
        work = std::move(idle_.back());
        idle_.pop_back();
      }
    }
    if (!work) work = std::make_unique<Workspace>(network_, max_nodes_);
    return std::unique_ptr<Workspace, decltype(give_back)>(work.release(), give_back);
  }

 private:
  const Network& network_;
  int64_t max_nodes_ = 0;
  std::mutex mutex_;
  std::vector<std::unique_ptr<Workspace>> idle_;
};

class Search {
 public:
  Search(const Network& network, const Energy& energy, const Proposer& proposer, const Settings& settings, Key key,
         const uint32_t* ids, int64_t num_graphs)
      : network_(network),
        energy_(energy),
        proposer_(proposer),
        settings_(settings),
        key_(key),
        ids_(ids, ids + num_graphs),
        trials_(num_graphs),
        graphs_(num_graphs),
        slope_(network.norms() * 2 * network.stride),
        choice_(num_graphs),
        workspaces_(network) {
    for (Trial& trial : trials_) trial.change.resize(slope_.size());
  }

  template <typename Make>
  void build(int64_t max_nodes, const Make& make) {
    workspaces_.set_max_nodes(max_nodes);
    for_items(num_graphs(), [&](std::atomic<int64_t>& next, int64_t count) {
      const auto work = workspaces_.take();
      for (int64_t g; (g = next++) < count;) {
        graphs_[g] = make(g);
        graphs_[g]->rebuild(*work);
      }
    });
  }

  int64_t num_graphs() const { return static_cast<int64_t>(trials_.size()); }
  const SearchGraph& graph(int64_t g) const { return *graphs_[g]; }

  // Pool and graphs as they stand; all of it is updated in place.
  struct State {
    double *sums, *loss, *total, *excess, *energy, *trace;
    bool* hit;
    int64_t taken = 0, accepted = 0;
  };

  void run(int64_t first_step, State& state) {
    int64_t step = first_step;
    const int64_t last = first_step + settings_.steps;
    while (step < last) {
      int64_t stop = std::min(last, (step / settings_.interval + 1) * settings_.interval);
      if (settings_.stop_k > 0) stop = std::min(stop, (step / kCheckEvery + 1) * kCheckEvery);
      round(step, stop, state);
      for (; step < stop; ++step) state.trace[state.taken++] = step + 1 < stop ? previous_energy_ : *state.energy;
      const bool look = settings_.stop_k > 0 && step >= settings_.min_steps && step % kCheckEvery == 0;
      if (look && energy_.k(state.total) < settings_.stop_k) return;
    }
  }

 private:
  // Lanes of `words` counters from number `first` on.
  void uniforms(int64_t graph, int64_t step, uint32_t first, int words, double* u) const {
    for (int word = 0; word < words; ++word, u += 4) {
      uint32_t c[4] = {first + static_cast<uint32_t>(word), ids_[graph], static_cast<uint32_t>(step), kProposalStream};
      philox(c[0], c[1], c[2], c[3], key_);
      for (int lane = 0; lane < 4; ++lane) u[lane] = uniform_of<double>(c[lane]);
    }
  }

  // Graphs with the smallest uniform are edited.
  void choose(int64_t step) {
    for (int64_t g = 0; g < num_graphs(); ++g) {
      double u[4];
      uniforms(g, step, 0, 1, u);
      choice_[g] = {u[kChoice], g};
    }
    std::nth_element(choice_.begin(), choice_.begin() + (settings_.edited - 1), choice_.end());
    for (int64_t i = 0; i < settings_.edited; ++i) {
      const int64_t g = choice_[i].second;
      if (trials_[g].steps.empty()) chosen_.push_back(g);
      trials_[g].steps.push_back(step);
    }
  }

  void round(int64_t begin, int64_t end, State& state) {
    chosen_.clear();
    for (int64_t step = begin; step < end; ++step) choose(step);
    std::sort(chosen_.begin(), chosen_.end());
    energy_.slope(state.total, slope_);
    for_items(static_cast<int64_t>(chosen_.size()), [&](std::atomic<int64_t>& next, int64_t count) {
      int64_t i = next++;
      if (i >= count) return;
      const auto work = workspaces_.take();
      Attempt now = open_graph(chosen_[i], state, *work);
      while (i < count) {
        // A pool is larger than a cache: the rows of one graph are on their way while those of another are computed.
        const int64_t following = next++;
        Attempt then;
        if (following < count) then = open_graph(chosen_[following], state, *work);
        edit_graph(chosen_[i], now, *work);
        i = following;
        now = then;
      }
    });
    settle(state);
    for (const int64_t g : chosen_) trials_[g].steps.clear();
  }

  Attempt attempt(int64_t g, int64_t step, int64_t number, Workspace& work) {
    SearchGraph& graph = *graphs_[g];
    double u[kLanes];
    uniforms(g, step, static_cast<uint32_t>(2 * number), 2, u);
    Attempt attempt{proposer_.propose(graph, g, u, work.proposal), u[kAccept]};
    attempt.edit.valid = attempt.edit.valid && carried_out(graph, attempt.edit, work);
    if (attempt.edit.valid) graph.reach(attempt.edit);
    return attempt;
  }

  // The first of the edits of `edit_graph`.
  Attempt open_graph(int64_t g, const State& state, Workspace& work) {
    Trial& trial = trials_[g];
    trial.delta = trial.excess_change = 0;
    trial.accepted = 0;
    trial.loss = state.loss[g];
    trial.hit = state.hit[g];
    trial.edges_before = graphs_[g]->edges();
    trial.label_before = graphs_[g]->label();
    const Attempt first = attempt(g, trial.steps[0], 0, work);
    if (first.edit.valid) graphs_[g]->prefetch();
    return first;
  }

  void edit_graph(int64_t g, const Attempt& first, Workspace& work) {
    Trial& trial = trials_[g];
    SearchGraph& graph = *graphs_[g];
    for (const int64_t step : trial.steps) {
      const int64_t last = settings_.proposals - 1;
      Candidate best;
      for (int64_t j = 0; j <= last; ++j) {
        const bool opened = j == 0 && step == trial.steps[0];
        const Attempt now = opened ? first : attempt(g, step, j, work);
        if (!now.edit.valid) continue;
        graph.evaluate(work);
        const double excess_change = energy_.excess(work.scores.loss) - energy_.excess(trial.loss);
        const double delta =
            dot(slope_.data(), work.scores.change.data(), static_cast<int64_t>(slope_.size())) + excess_change;
        // A graph on which the teacher answers NaN compares as not lower.
        if (delta < best.delta) best = {now.edit, delta, excess_change, now.accept, j};
        if (best.number < last) graph.revert(now.edit);
      }
      if (best.number < 0) continue;
      if (best.number < last) {
        // Computed again, because another came after it; temperature 0, where it takes several.
        if (best.delta >= 0.0) continue;
        graph.carry_out(best.edit);
        graph.reach(best.edit);
        graph.evaluate(work);
      }
      if (!(best.delta < allowed(g, best, work))) {
        graph.revert(best.edit);
        continue;
      }
      graph.keep(work);
      if (trial.accepted++ == 0) std::fill(trial.change.begin(), trial.change.end(), 0.0);
      for (size_t k = 0; k < slope_.size(); ++k) trial.change[k] += work.scores.change[k];
      trial.delta += best.delta;
      trial.excess_change += best.excess_change;
      trial.loss = work.scores.loss;
      trial.hit = work.scores.hit;
    }
  }

  // Carries out an edit unless it would leave a connected graph in parts that must stay whole.
  bool carried_out(SearchGraph& graph, const Edit& edit, Workspace& work) const {
    graph.carry_out(edit);
    if (!proposer_.keeps_connected() || edit.num_old == 0 || graph.connected(work.proposal)) return true;
    graph.revert(edit);
    if (graph.connected(work.proposal)) return false;
    graph.carry_out(edit);
    return true;
  }

  // The change of the energy below which an edit, already carried out, passes.
  double allowed(int64_t g, const Candidate& candidate, Workspace& work) const {
    if (settings_.temperature == 0.0) return 0.0;
    const double ratio = proposer_.log_ratio(*graphs_[g], g, candidate.edit, work.proposal);
    return (ratio - std::log(candidate.accept)) * (settings_.temperature / static_cast<double>(num_graphs()));
  }

  // Keeps the edits if together they do not raise the true energy; else tries the more promising half, and so on.
  void settle(State& state) {
    std::vector<int64_t> kept;
    for (const int64_t g : chosen_) {
      if (trials_[g].accepted) kept.push_back(g);
    }
    const std::vector<int64_t> passed = kept;
    std::vector<int64_t> order;
    std::vector<double> total(2 * energy_.channels());
    previous_energy_ = *state.energy;
    while (!kept.empty()) {
      std::copy_n(state.total, total.size(), total.data());
      double excess = 0;
      for (const int64_t g : kept) {
        energy_.add(trials_[g].change, total.data());
        excess += trials_[g].excess_change;
      }
      excess += *state.excess;
      const double value = energy_.value(total.data(), excess);
      if (settings_.temperature > 0.0 || value <= *state.energy) {
        std::copy_n(total.data(), total.size(), state.total);
        *state.excess = excess;
        *state.energy = value;
        break;
      }
      if (order.empty()) {
        order = kept;
        std::stable_sort(order.begin(), order.end(),
                         [&](int64_t a, int64_t b) { return trials_[a].delta < trials_[b].delta; });
      }
      kept.assign(order.begin(), order.begin() + static_cast<int64_t>(kept.size()) / 2);
      std::sort(kept.begin(), kept.end());
    }
    for (const int64_t g : kept) {
      energy_.add(trials_[g].change, state.sums + g * 2 * energy_.channels());
      state.loss[g] = trials_[g].loss;
      state.hit[g] = trials_[g].hit;
      state.accepted += trials_[g].accepted;
    }
    std::vector<int64_t> undone;
    std::set_difference(passed.begin(), passed.end(), kept.begin(), kept.end(), std::back_inserter(undone));
    for_items(static_cast<int64_t>(undone.size()), [&](std::atomic<int64_t>& next, int64_t count) {
      int64_t i = next++;
      if (i >= count) return;
      const auto work = workspaces_.take();
      for (; i < count; i = next++) {
        const Trial& trial = trials_[undone[i]];
        graphs_[undone[i]]->restore(trial.edges_before, trial.label_before, *work);
      }
    });
  }

  const Network& network_;
  const Energy& energy_;
  const Proposer& proposer_;
  const Settings settings_;
  const Key key_;
  const std::vector<uint32_t> ids_;
  std::vector<Trial> trials_;
  std::vector<std::unique_ptr<SearchGraph>> graphs_;
  std::vector<double> slope_;
  std::vector<std::pair<double, int64_t>> choice_;
  std::vector<int64_t> chosen_;
  Workspaces workspaces_;
  double previous_energy_ = 0;
};

}  // namespace acgkd
