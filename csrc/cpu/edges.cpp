// sample_edges: logits stored one per pair.
#include "cpu/compact.h"

namespace acgkd {
namespace {

SampleTensors sample_edges(const Tensor& logits, const Tensor& table, const Tensor& rng, const Tensor& temperature,
                           int64_t kind, int64_t estimator, int64_t noise, double gamma, double zeta,
                           double absent_rate, int64_t num_nodes, int64_t capacity) {
  const char* op = "sample_edges";
  const Layouts layouts(op, table, kind);
  check(op, "logits", logits, logits.scalar_type(), {layouts.num_pairs});
  STD_TORCH_CHECK(num_nodes == layouts.num_nodes, op, ": num_nodes: expected ", layouts.num_nodes, ", got ", num_nodes);
  const Draw draw = make_draw(op, rng, temperature, estimator, noise, gamma, zeta, absent_rate);
  return by_dtype(op, logits, [&](auto* type) {
    using Stored = std::remove_pointer_t<decltype(type)>;
    using Real = WideOf<Stored>;
    const Stored* values = read<Stored>(logits);
    const LogitSource<Real> source = [values](const GraphLayout& graph, int64_t first, int count, Real* theta) {
      load_block(values + graph.first_pair + first, count, theta);
    };
    return compact<Stored>(op, layouts, draw_pairs(source, layouts, draw), logits, table, capacity);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(acgkd_fast, CPU, m) { m.impl("sample_edges", TORCH_BOX(&sample_edges)); }

}  // namespace acgkd
