// sample_edges_backward(_sparse), candidate_port and its backward, pair_uniforms. Noise is drawn again, never stored.
#include <algorithm>
#include <array>

#include "cpu/candidates.h"
#include "cpu/slopes.h"

namespace acgkd {
namespace {

// The checked arguments of both backward operators.
struct Sampled {
  Sampled(const char* op, const Tensor& grad_value, const Tensor& rowptr, const Tensor& col, const Tensor& pair,
          const Tensor& logits, const Tensor& table, int64_t kind, const Draw& draw)
      : layouts(op, table, kind), matrix(op, rowptr, col, layouts.num_nodes), pairs(read<int64_t>(pair)), draw(draw) {
    check(op, "logits", logits, logits.scalar_type(), {layouts.num_pairs});
    check(op, "grad_value", grad_value, logits.scalar_type(), {col.size(0)});
    check(op, "pair", pair, ScalarType::Long, {col.size(0)});
    check_range(op, "pair", pairs, matrix.num_entries, layouts.num_pairs);
  }

  // Of the two directions of an edge, the lower triangle speaks for both.
  bool directed() const { return layouts.kind & kDirected; }

  // Entries of a row that speak for their pair.
  int64_t speakers(int64_t row) const {
    const int32_t *begin = matrix.col + matrix.rowptr[row], *end = matrix.col + matrix.rowptr[row + 1];
    return directed() ? end - begin : std::upper_bound(begin, end, static_cast<int32_t>(row)) - begin;
  }

  Layouts layouts;
  Matrix matrix;
  const int64_t* pairs;
  Draw draw;
};

// Gradient of the logit behind each entry that speaks for its pair, written at the pair's number, or one behind the
// other where `row_ptr` says at which place each row begins.
template <typename Stored>
void entry_gradients(const Sampled& sampled, const Stored* theta, const Stored* grad, const int64_t* row_ptr,
                     Stored* out) {
  const Matrix& matrix = sampled.matrix;
  torch::stable::parallel_for(0, matrix.num_rows, matrix.rows_per_task(64), [&](int64_t begin, int64_t end) {
    Batch<WideOf<Stored>> batch;
    // Logits far apart, asked for at once and read when the batch is full.
    const Stored* waiting[kLanes];
    const auto finish = [&] {
      for (int i = 0; i < batch.size; ++i) batch.theta[i] = static_cast<WideOf<Stored>>(*waiting[i]);
      flush(sampled.draw, batch, out);
    };
    Mirrors<Stored> mirrored(matrix, sampled.pairs, grad);
    int64_t g = sampled.layouts.graph_of_node(begin);
    GraphLayout graph = sampled.layouts[g];
    if (!sampled.directed()) mirrored.enter(graph, begin);
    int64_t place = row_ptr ? row_ptr[begin] : 0;
    for (int64_t row = begin; row < end; ++row) {
      while (row >= graph.first_node + graph.num_nodes) {
        graph = sampled.layouts[++g];
        if (!sampled.directed()) mirrored.enter(graph, row);
      }
      const int64_t first = matrix.rowptr[row], last = first + sampled.speakers(row);
      for (int64_t e = first; e < last; ++e) {
        const int64_t pair = sampled.pairs[e];
        WideOf<Stored> total = static_cast<WideOf<Stored>>(grad[e]);
        if (!sampled.directed()) total += mirrored(row, e);
        waiting[batch.size] = theta + pair;
        __builtin_prefetch(theta + pair);
        batch.add(graph, pair - graph.first_pair, row_ptr ? place++ : pair, 0, total);
        if (batch.size == kLanes) finish();
      }
      if (!sampled.directed()) mirrored.leave(row, last);
    }
    finish();
  });
}

Tensor sample_edges_backward(const Tensor& grad_value, const Tensor& rowptr, const Tensor& col, const Tensor& pair,
                             const Tensor& logits, const Tensor& table, const Tensor& rng, const Tensor& temperature,
                             int64_t kind, int64_t estimator, int64_t noise, double gamma, double zeta,
                             double absent_rate) {
  const char* op = "sample_edges_backward";
  const Draw draw = make_draw(op, rng, temperature, estimator, noise, gamma, zeta, absent_rate);
  const Sampled sampled(op, grad_value, rowptr, col, pair, logits, table, kind, draw);
  const int64_t num_pairs = sampled.layouts.num_pairs;
  const Tensor grad_logits = new_tensor(logits, {num_pairs}, logits.scalar_type());
  by_dtype(op, logits, [&](auto* type) {
    using Stored = std::remove_pointer_t<decltype(type)>;
    Stored* out = write<Stored>(grad_logits);
    torch::stable::parallel_for(0, num_pairs, 1 << 16, [&](int64_t begin, int64_t end) {
      std::fill(out + begin, out + end, Stored(0));
    });
    // The ARM gradient comes from two losses, not from here.
    if (draw.estimator == kArm || draw.estimator == kArmMirrored) return;
    entry_gradients(sampled, read<Stored>(logits), read<Stored>(grad_value), nullptr, out);
  });
  return grad_logits;
}

std::tuple<Tensor, Tensor> sample_edges_backward_sparse(const Tensor& grad_value, const Tensor& rowptr,
                                                        const Tensor& col, const Tensor& pair, const Tensor& logits,
                                                        const Tensor& table, const Tensor& rng,
                                                        const Tensor& temperature, int64_t kind, int64_t estimator,
                                                        int64_t noise, double gamma, double zeta, double absent_rate) {
  const char* op = "sample_edges_backward_sparse";
  const Draw draw = make_draw(op, rng, temperature, estimator, noise, gamma, zeta, absent_rate);
  const Sampled sampled(op, grad_value, rowptr, col, pair, logits, table, kind, draw);
  const bool arm = estimator == kArm || estimator == kArmMirrored;
  std::vector<int64_t> row_ptr(sampled.layouts.num_nodes + 1, 0);
  for (int64_t row = 0; row < sampled.layouts.num_nodes && !arm; ++row) {
    row_ptr[row + 1] = row_ptr[row] + sampled.speakers(row);
  }
  const Tensor index = new_tensor(pair, {row_ptr.back()}, ScalarType::Long);
  const Tensor grad = new_tensor(logits, {row_ptr.back()}, logits.scalar_type());
  for (int64_t row = 0; row < sampled.layouts.num_nodes; ++row) {
    std::copy_n(sampled.pairs + sampled.matrix.rowptr[row], row_ptr[row + 1] - row_ptr[row],
                write<int64_t>(index) + row_ptr[row]);
  }
  by_dtype(op, logits, [&](auto* type) {
    using Stored = std::remove_pointer_t<decltype(type)>;
    if (arm) return;
    entry_gradients(sampled, read<Stored>(logits), read<Stored>(grad_value), row_ptr.data(), write<Stored>(grad));
  });
  return {index, grad};
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
  m.impl("sample_edges_backward_sparse", TORCH_BOX(&sample_edges_backward_sparse));
  m.impl("candidate_port", TORCH_BOX(&candidate_port));
  m.impl("candidate_port_backward", TORCH_BOX(&candidate_port_backward));
  m.impl("candidate_backward", TORCH_BOX(&candidate_backward));
  m.impl("pair_uniforms", TORCH_BOX(&pair_uniforms));
}

}  // namespace acgkd
