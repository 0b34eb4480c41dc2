// Many steps of the search in one call, parallel over graphs.
#include <atomic>
#include <numeric>
#include <tuple>

#include "cpu/matrix.h"
#include "cpu/search_energy.h"
#include "cpu/search_graph.h"
#include "cpu/search_rows.h"

namespace acgkd {
namespace {

// As in acgkd_fast/distill/refiner.py.
constexpr int64_t kCheckEvery = 10;

struct Settings {
  int64_t steps, interval, edited, min_steps;
  double temperature, stop_k;
  MoveMix mix;
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

// The threads take items from one counter, so that graphs of unlike cost keep all of them busy. What an item does
// may not depend on the thread.
template <typename Function>
void for_items(int64_t count, const Function& function) {
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, count, 1, [&](int64_t, int64_t) { function(next, count); });
}

class Search {
 public:
  Search(const Network& network, const Energy& energy, const Settings& settings, Key key, const uint32_t* ids,
         int64_t num_graphs)
      : network_(network),
        energy_(energy),
        settings_(settings),
        key_(key),
        ids_(ids, ids + num_graphs),
        trials_(num_graphs),
        graphs_(num_graphs),
        slope_(network.norms() * 2 * network.stride),
        choice_(num_graphs) {
    for (Trial& trial : trials_) trial.change.resize(slope_.size());
  }

  template <typename Make>
  void build(int64_t max_nodes, const Make& make) {
    max_nodes_ = max_nodes;
    for_items(num_graphs(), [&](std::atomic<int64_t>& next, int64_t count) {
      Workspace work(network_, max_nodes_);
      for (int64_t g; (g = next++) < count;) {
        graphs_[g] = make(g);
        graphs_[g]->rebuild(work);
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
  void uniforms(int64_t graph, int64_t step, int words, double* u) const {
    for (uint32_t word = 0; word < static_cast<uint32_t>(words); ++word) {
      uint32_t c[4] = {word, ids_[graph], static_cast<uint32_t>(step), kProposalStream};
      philox(c[0], c[1], c[2], c[3], key_);
      for (int lane = 0; lane < 4; ++lane) u[4 * word + lane] = uniform_of<double>(c[lane]);
    }
  }

  // Graphs with the smallest uniform are edited.
  void choose(int64_t step) {
    for (int64_t g = 0; g < num_graphs(); ++g) {
      double u[4];
      uniforms(g, step, 1, u);
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
      Workspace work(network_, max_nodes_);
      for (; i < count; i = next++) edit_graph(chosen_[i], state, work);
    });
    settle(state);
    for (const int64_t g : chosen_) trials_[g].steps.clear();
  }

  void edit_graph(int64_t g, const State& state, Workspace& work) {
    Trial& trial = trials_[g];
    SearchGraph& graph = *graphs_[g];
    trial.delta = trial.excess_change = 0;
    trial.accepted = 0;
    trial.loss = state.loss[g];
    trial.hit = state.hit[g];
    for (const int64_t step : trial.steps) {
      double u[8];
      uniforms(g, step, 2, u);
      const Edit edit = graph.propose(settings_.mix, u);
      if (!edit.valid) continue;
      if (trial.accepted == 0) {
        trial.edges_before = graph.edges();
        trial.label_before = graph.label();
      }
      graph.apply(edit, work);
      const double excess_change = energy_.excess(work.scores.loss) - energy_.excess(trial.loss);
      const double delta =
          dot(slope_.data(), work.scores.change.data(), static_cast<int64_t>(slope_.size())) + excess_change;
      // A graph on which the teacher answers NaN compares as not lower.
      if (!(delta < allowed(graph, edit, u[kAccept]))) {
        graph.revert(edit);
        continue;
      }
      graph.keep(work);
      if (trial.accepted++ == 0) std::fill(trial.change.begin(), trial.change.end(), 0.0);
      for (size_t k = 0; k < slope_.size(); ++k) trial.change[k] += work.scores.change[k];
      trial.delta += delta;
      trial.excess_change += excess_change;
      trial.loss = work.scores.loss;
      trial.hit = work.scores.hit;
    }
  }

  // The change of the energy below which an edit, already carried out, passes.
  double allowed(const SearchGraph& graph, const Edit& edit, double u) const {
    if (settings_.temperature == 0.0) return 0.0;
    const double n = static_cast<double>(graph.nodes()), count = static_cast<double>(graph.edges().size());
    const double chance = 2.0 / std::max(n * (n - 1.0), 1.0);
    double ratio = 0;
    if (edit.kind == Move::kAdd) ratio = -std::log(count * chance);
    if (edit.kind == Move::kDelete) ratio = std::log((count + 1.0) * chance);
    return (ratio - std::log(u)) * (settings_.temperature / static_cast<double>(num_graphs()));
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
      Workspace work(network_, max_nodes_);
      for (; i < count; i = next++) {
        const Trial& trial = trials_[undone[i]];
        graphs_[undone[i]]->restore(trial.edges_before, trial.label_before, work);
      }
    });
  }

  const Network& network_;
  const Energy& energy_;
  const Settings settings_;
  const Key key_;
  const std::vector<uint32_t> ids_;
  std::vector<Trial> trials_;
  std::vector<std::unique_ptr<SearchGraph>> graphs_;
  std::vector<double> slope_;
  std::vector<std::pair<double, int64_t>> choice_;
  std::vector<int64_t> chosen_;
  int64_t max_nodes_ = 0;
  double previous_energy_ = 0;
};

template <typename T>
Tensor copy_of(const Tensor& tensor) {
  Tensor copy = torch::stable::empty_like(tensor);
  std::copy_n(read<T>(tensor), tensor.numel(), write<T>(copy));
  return copy;
}

using Result = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Result search_steps(const Tensor& pairs, const Tensor& counts, const Tensor& label, const Tensor& sums,
                    const Tensor& loss, const Tensor& hit, const Tensor& total, const Tensor& level, const Tensor& x,
                    const Tensor& y, const Tensor& ptr, const Tensor& ids, const Tensor& parameters,
                    const Tensor& running, const Tensor& rng, bool gin, int64_t depth, int64_t width, int64_t classes,
                    int64_t readout, int64_t steps, int64_t interval, int64_t edited, int64_t num_labels,
                    double below_relabel, double below_rewire, double below_add, double lam_k, double w_ce, double cap,
                    double temperature, double stop_k, int64_t min_steps) {
  const char* op = "search_steps";
  check(op, "x", x, ScalarType::Float, {kAny, kAny});
  const int64_t nodes = x.size(0), features = x.size(1);
  const Network network(op, parameters, gin, depth, features, width, classes, readout);
  check(op, "y", y, ScalarType::Long, {kAny});
  const int64_t num_graphs = y.size(0), channels = network.norms() * width;
  check(op, "pairs", pairs, ScalarType::Long, {num_graphs, kAny});
  check(op, "counts", counts, ScalarType::Long, {num_graphs});
  check(op, "label", label, ScalarType::Long, {nodes});
  check(op, "sums", sums, ScalarType::Double, {num_graphs, 2, channels});
  check(op, "loss", loss, ScalarType::Double, {num_graphs});
  check(op, "hit", hit, ScalarType::Bool, {num_graphs});
  check(op, "total", total, ScalarType::Double, {2, channels});
  check(op, "level", level, ScalarType::Double, {2});
  check(op, "ptr", ptr, ScalarType::Long, {num_graphs + 1});
  check(op, "ids", ids, ScalarType::Long, {num_graphs});
  check(op, "running", running, ScalarType::Double, {3, channels});
  check(op, "rng", rng, ScalarType::Long, {2});
  STD_TORCH_CHECK(steps >= 0 && interval >= 1 && edited >= 1 && edited <= num_graphs, op,
                  ": expected steps of 0 or more, an interval of 1 or more and 1..", num_graphs,
                  " graphs edited at a time, got ", steps, ", ", interval, " and ", edited);
  STD_TORCH_CHECK(num_labels <= 1 || num_labels == features, op, ": num_labels: expected 0, 1 or ", features, ", got ",
                  num_labels);
  const bool labelled = num_labels > 1;
  const int64_t *offset = read<int64_t>(ptr), *count = read<int64_t>(counts);
  check_range(op, "y", read<int64_t>(y), num_graphs, classes);
  if (labelled) check_range(op, "label", read<int64_t>(label), nodes, num_labels);
  const int64_t capacity = pairs.size(1);
  int64_t max_nodes = 1;
  bool valid = offset[0] == 0 && offset[num_graphs] == nodes;
  for (int64_t g = 0; g < num_graphs; ++g) {
    const int64_t n = offset[g + 1] - offset[g];
    max_nodes = std::max(max_nodes, n);
    valid = valid && n >= 1 && n < (int64_t(1) << 31) && count[g] >= 0 && count[g] + steps <= capacity;
    for (int64_t e = 0; valid && e < count[g]; ++e) {
      const int64_t pair = read<int64_t>(pairs)[g * capacity + e], low = pair >> 32, high = pair & 0xffffffff;
      valid = low >= 0 && low < high && high < n;
    }
  }
  STD_TORCH_CHECK(valid, op, ": ptr, pairs, counts: expected graphs of 1 node or more, edges low < high inside them, "
                  "and room for one more edge per step, got others");

  Result result{copy_of<int64_t>(pairs), copy_of<int64_t>(counts), copy_of<int64_t>(label), copy_of<double>(sums),
                copy_of<double>(loss), copy_of<bool>(hit), copy_of<double>(total), copy_of<double>(level),
                new_tensor(loss, {steps}, ScalarType::Double), new_tensor(counts, {2}, ScalarType::Long)};
  auto& [new_pairs, new_counts, new_label, new_sums, new_loss, new_hit, new_total, new_level, trace, progress] = result;

  const Energy energy(network, read<double>(running), nodes, num_graphs, lam_k, w_ce, cap);
  const Settings settings{steps, interval, edited, min_steps, temperature, stop_k,
                          {below_relabel, below_rewire, below_add, num_labels}};
  std::vector<uint32_t> words(num_graphs);
  std::transform(read<int64_t>(ids), read<int64_t>(ids) + num_graphs, words.begin(),
                 [](int64_t id) { return static_cast<uint32_t>(id); });
  Search search(network, energy, settings, key_of(read<int64_t>(rng)[0]), words.data(), num_graphs);
  search.build(max_nodes, [&](int64_t g) {
    const int64_t* row = read<int64_t>(pairs) + g * capacity;
    std::vector<Edge> edges(count[g]);
    std::transform(row, row + count[g], edges.begin(), [](int64_t pair) {
      return Edge{static_cast<int32_t>(pair >> 32), static_cast<int32_t>(pair & 0xffffffff)};
    });
    return std::make_unique<SearchGraph>(network, offset[g + 1] - offset[g], std::move(edges),
                                         read<float>(x) + offset[g] * features,
                                         labelled ? read<int64_t>(label) + offset[g] : nullptr, read<int64_t>(y)[g]);
  });

  std::fill_n(write<double>(trace), steps, std::nan(""));
  Search::State state{write<double>(new_sums), write<double>(new_loss), write<double>(new_total),
                      write<double>(new_level), write<double>(new_level) + 1, write<double>(trace),
                      write<bool>(new_hit)};
  search.run(read<int64_t>(rng)[1], state);

  for (int64_t g = 0; g < num_graphs; ++g) {
    const SearchGraph& graph = search.graph(g);
    int64_t* row = write<int64_t>(new_pairs) + g * capacity;
    for (const Edge edge : graph.edges()) *row++ = (static_cast<int64_t>(edge.low) << 32) | edge.high;
    write<int64_t>(new_counts)[g] = static_cast<int64_t>(graph.edges().size());
    if (labelled) std::copy(graph.label().begin(), graph.label().end(), write<int64_t>(new_label) + offset[g]);
  }
  write<int64_t>(progress)[0] = state.taken;
  write<int64_t>(progress)[1] = state.accepted;
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(acgkd_fast, CPU, m) { m.impl("search_steps", TORCH_BOX(&search_steps)); }

}  // namespace acgkd
