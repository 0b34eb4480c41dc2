// Many steps of the search in one call, parallel over graphs.
#include <optional>
#include <tuple>

#include "cpu/matrix.h"
#include "cpu/search_pool.h"

namespace acgkd {
namespace {

template <typename T>
Tensor copy_of(const Tensor& tensor) {
  Tensor copy = torch::stable::empty_like(tensor);
  std::copy_n(read<T>(tensor), tensor.numel(), write<T>(copy));
  return copy;
}

// None where new edges are uniform.
std::optional<PairWeights> pair_weights(const char* op, const std::optional<Tensor>& weight,
                                        const std::optional<Tensor>& cumulative, const std::optional<Tensor>& table,
                                        int64_t kind, const Tensor& ptr) {
  if (!weight) return std::nullopt;
  STD_TORCH_CHECK(cumulative && table && !(kind & kDirected), op,
                  ": weight: expected cumulative sums and an undirected layout with it, got others");
  const PairWeights weights{Layouts(op, *table, kind), read<double>(*weight), read<double>(*cumulative)};
  const Layouts& layouts = weights.layouts;
  check(op, "weight", *weight, ScalarType::Double, {layouts.num_pairs});
  check(op, "cumulative", *cumulative, ScalarType::Double, {layouts.num_pairs + 1});
  const int64_t* offset = read<int64_t>(ptr);
  bool same = layouts.num_graphs == ptr.size(0) - 1;
  for (int64_t g = 0; same && g < layouts.num_graphs; ++g) {
    same = layouts[g].first_node == offset[g] && layouts[g].num_nodes == offset[g + 1] - offset[g];
  }
  STD_TORCH_CHECK(same, op, ": table: expected a layout of the graphs of ptr, got another");
  return weights;
}

using Result = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Result search_steps(const Tensor& pairs, const Tensor& counts, const Tensor& label, const Tensor& sums,
                    const Tensor& loss, const Tensor& hit, const Tensor& total, const Tensor& level, const Tensor& x,
                    const Tensor& y, const Tensor& ptr, const Tensor& ids, const Tensor& parameters,
                    const Tensor& running, const Tensor& rng, bool gin, int64_t depth, int64_t width, int64_t classes,
                    int64_t readout, int64_t steps, int64_t interval, int64_t edited, int64_t num_labels,
                    double below_relabel, double below_rewire, double below_add, double lam_k, double w_ce, double cap,
                    double temperature, double stop_k, int64_t min_steps, int64_t proposals, double two_hop,
                    bool keep_degrees, bool connected, int64_t max_degree, const std::optional<Tensor>& weight,
                    const std::optional<Tensor>& cumulative, const std::optional<Tensor>& table, int64_t kind) {
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
  STD_TORCH_CHECK(proposals >= 1 && (proposals == 1 || temperature == 0.0), op,
                  ": proposals: expected 1 or more, and 1 with a temperature, got ", proposals);
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
  const Settings settings{steps, interval, edited, min_steps, proposals, temperature, stop_k};
  const Proposer proposer({below_relabel, below_rewire, below_add, two_hop, keep_degrees, connected, max_degree,
                           num_labels},
                          pair_weights(op, weight, cumulative, table, kind, ptr));
  std::vector<uint32_t> words(num_graphs);
  std::transform(read<int64_t>(ids), read<int64_t>(ids) + num_graphs, words.begin(),
                 [](int64_t id) { return static_cast<uint32_t>(id); });
  Search search(network, energy, proposer, settings, key_of(read<int64_t>(rng)[0]), words.data(), num_graphs);
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
