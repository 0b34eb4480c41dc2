// sample_edges_backward, candidate_port and its backward, pair_uniforms. Noise is drawn again, never stored.
#include <algorithm>
#include <array>

#include "cpu/candidates.h"
#include "cpu/slopes.h"

namespace acgkd {
namespace {

Tensor sample_edges_backward(const Tensor& grad_value, const Tensor& rowptr, const Tensor& col, const Tensor& pair,
                             const Tensor& logits, const Tensor& table, const Tensor& rng, const Tensor& temperature,
                             int64_t kind, int64_t estimator, int64_t noise, double gamma, double zeta,
                             double absent_rate) {
  const char* op = "sample_edges_backward";
  const Layouts layouts(op, table, kind);
  check(op, "logits", logits, logits.scalar_type(), {layouts.num_pairs});
  const Matrix sample(op, rowptr, col, layouts.num_nodes);
  check(op, "grad_value", grad_value, logits.scalar_type(), {col.size(0)});
  check(op, "pair", pair, ScalarType::Long, {col.size(0)});
  const int64_t* pairs = read<int64_t>(pair);
  check_range(op, "pair", pairs, sample.num_entries, layouts.num_pairs);
  const Draw draw = make_draw(op, rng, temperature, estimator, noise, gamma, zeta, absent_rate);
  const Tensor grad_logits = new_tensor(logits, {layouts.num_pairs}, logits.scalar_type());

  by_dtype(op, logits, [&](auto* type) {
    using Stored = std::remove_pointer_t<decltype(type)>;
    const Stored *theta = read<Stored>(logits), *grad = read<Stored>(grad_value);
    Stored* out = write<Stored>(grad_logits);
    torch::stable::parallel_for(0, layouts.num_pairs, 1 << 16, [&](int64_t begin, int64_t end) {
      std::fill(out + begin, out + end, Stored(0));
    });
    // The ARM gradient comes from two losses, not from here.
    if (draw.estimator == kArm || draw.estimator == kArmMirrored) return;
    const bool directed = kind & kDirected;
    torch::stable::parallel_for(0, layouts.num_nodes, sample.rows_per_task(64), [&](int64_t begin, int64_t end) {
      Batch<WideOf<Stored>> batch;
      int64_t g = layouts.graph_of_node(begin);
      GraphLayout graph = layouts[g];
      for (int64_t row = begin; row < end; ++row) {
        while (row >= graph.first_node + graph.num_nodes) graph = layouts[++g];
        for (int64_t e = sample.rowptr[row]; e < sample.rowptr[row + 1]; ++e) {
          // Of the two directions of an edge, the lower triangle speaks for both.
          if (!directed && sample.col[e] > row) break;
          WideOf<Stored> total = static_cast<WideOf<Stored>>(grad[e]);
          if (!directed) total += mirrored_grad(sample, pairs, grad, row, e, graph.first_node);
          batch.add(graph, pairs[e] - graph.first_pair, pairs[e], static_cast<WideOf<Stored>>(theta[pairs[e]]), total);
          if (batch.size == kLanes) flush(draw, batch, out);
        }
      }
      flush(draw, batch, out);
    });
  });
  return grad_logits;
}

Draw straight_through(const char* op, const Layouts& layouts, const Tensor& logits, const Tensor& rng,
                      const Tensor& temperature, int64_t noise) {
  check(op, "logits", logits, logits.scalar_type(), {layouts.num_pairs});
  return make_draw(op, rng, temperature, kStraightThrough, noise, 0.0, 1.0, 0.0);
}

Tensor candidate_port(const Tensor& logits, const Tensor& table, const Tensor& rng, const Tensor& temperature,
                      int64_t kind, int64_t noise) {
  const char* op = "candidate_port";
  const Layouts layouts(op, table, kind);
  straight_through(op, layouts, logits, rng, temperature, noise);
  const int64_t one = 1;
  const Tensor zero = torch::stable::new_zeros(logits, {&one, 1});
  // `false` is the keyword `implicit` of aten::expand.
  std::array<StableIValue, 3> stack{torch::stable::detail::from(zero), torch::stable::detail::from(logits.sizes()),
                                    torch::stable::detail::from(false)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::expand", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// out = slope times grad where the pair was not drawn, else 0; `out` may be `grad`.
template <typename Stored>
void absent_gradient(const Layouts& layouts, const Draw& draw, const Stored* theta, const Stored* grad, Stored* out) {
  for_pair_blocks(layouts, draw.address, [&](const GraphLayout& graph, const Address& address, int64_t first, int count) {
    Batch<WideOf<Stored>> batch;
    const int64_t offset = graph.first_pair + first;
    load_block(theta + offset, count, batch.theta);
    words_block(address, static_cast<uint32_t>(first / 4), batch.words);
    uniforms_block(batch.words, false, batch.u);
    slopes(draw, batch.theta, batch.u, batch.z, batch.slope);
    const uint64_t drawn = drawn_block(batch.theta, batch.u, draw.noise);
    for (int i = 0; i < count; ++i) {
      const auto incoming = static_cast<WideOf<Stored>>(grad[offset + i]);
      out[offset + i] = static_cast<Stored>(drawn >> i & 1 ? 0 : batch.slope[i] * incoming);
    }
  });
}

Tensor candidate_port_backward(const Tensor& grad_port, const Tensor& logits, const Tensor& table, const Tensor& rng,
                               const Tensor& temperature, int64_t kind, int64_t noise) {
  const char* op = "candidate_port_backward";
  const Layouts layouts(op, table, kind);
  const Draw draw = straight_through(op, layouts, logits, rng, temperature, noise);
  check(op, "grad_port", grad_port, logits.scalar_type(), {layouts.num_pairs});
  const Tensor grad_logits = new_tensor(logits, {layouts.num_pairs}, logits.scalar_type());
  by_dtype(op, logits, [&](auto* type) {
    using Stored = std::remove_pointer_t<decltype(type)>;
    absent_gradient(layouts, draw, read<Stored>(logits), read<Stored>(grad_port), write<Stored>(grad_logits));
  });
  return grad_logits;
}

Tensor candidate_backward(const Tensor& left, const Tensor& right, const Tensor& node_term, const Tensor& logits,
                          const Tensor& table, const Tensor& rng, const Tensor& temperature, int64_t kind,
                          int64_t noise) {
  const char* op = "candidate_backward";
  const Layouts layouts(op, table, kind);
  const Draw draw = straight_through(op, layouts, logits, rng, temperature, noise);
  check(op, "left", left, logits.scalar_type(), {layouts.num_nodes, kAny});
  const Tensor grad = candidate_gradient(left, right, node_term, table, kind, layouts.num_pairs);
  by_dtype(op, logits, [&](auto* type) {
    using Stored = std::remove_pointer_t<decltype(type)>;
    absent_gradient(layouts, draw, read<Stored>(logits), read<Stored>(grad), write<Stored>(grad));
  });
  return grad;
}

Tensor pair_uniforms(const Tensor& table, const Tensor& rng, int64_t kind, int64_t stream, int64_t num_pairs) {
  const char* op = "pair_uniforms";
  const Layouts layouts(op, table, kind);
  check(op, "rng", rng, ScalarType::Long, {2});
  STD_TORCH_CHECK(num_pairs == layouts.num_pairs, op, ": num_pairs: expected ", layouts.num_pairs, ", got ", num_pairs);
  STD_TORCH_CHECK(stream >= 0 && stream < kNumStreams, op, ": stream: expected 0..", kNumStreams - 1, ", got ", stream);
  const int64_t* words = read<int64_t>(rng);
  const Address address{key_of(words[0]), 0, static_cast<uint32_t>(words[1]), static_cast<uint32_t>(stream)};
  const Tensor uniforms = new_tensor(table, {num_pairs}, ScalarType::Float);
  float* out = write<float>(uniforms);
  for_pair_blocks(layouts, address, [&](const GraphLayout& graph, const Address& mine, int64_t first, int count) {
    uint32_t drawn[kLanes];
    float u[kLanes];
    words_block(mine, static_cast<uint32_t>(first / 4), drawn);
    uniforms_block(drawn, false, u);
    std::copy_n(u, count, out + graph.first_pair + first);
  });
  return uniforms;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(acgkd_fast, CPU, m) {
  m.impl("sample_edges_backward", TORCH_BOX(&sample_edges_backward));
  m.impl("candidate_port", TORCH_BOX(&candidate_port));
  m.impl("candidate_port_backward", TORCH_BOX(&candidate_port_backward));
  m.impl("candidate_backward", TORCH_BOX(&candidate_backward));
  m.impl("pair_uniforms", TORCH_BOX(&pair_uniforms));
}

}  // namespace acgkd
