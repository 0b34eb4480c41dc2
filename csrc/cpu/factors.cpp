// sample_factor_edges and its backward: logits z_i . z_j + b that are never stored.
#include <algorithm>
#include <vector>

#include "cpu/compact.h"
#include "cpu/simd.h"
#include "cpu/slopes.h"

namespace acgkd {
namespace {

// Products of one node with kLanes consecutive ones, whose factors stand channel by channel.
template <typename Real>
ACGKD_SHARED void products(const Real* node, const Real* channels, int64_t stride, int64_t rank, Real bias, Real* theta) {
  constexpr int kVectors = kLanes / kWidth<Real>;
  Vec<Real> total[kVectors];
  for (int v = 0; v < kVectors; ++v) total[v] = Vec<Real>{} + bias;
  for (int64_t k = 0; k < rank; ++k) {
    for (int v = 0; v < kVectors; ++v) total[v] += node[k] * load(channels + k * stride + v * kWidth<Real>);
  }
  std::memcpy(theta, total, sizeof total);
}

template <typename Real>
ACGKD_SHARED Real product(const Real* a, const Real* b, int64_t rank) {
  Vec<Real> total = {};
  int64_t k = 0;
  for (; k + kWidth<Real> <= rank; k += kWidth<Real>) total += load(a + k) * load(b + k);
  Real rest = 0;
  for (; k < rank; ++k) rest += a[k] * b[k];
  return sum<Real>(total) + rest;
}

template <typename Real>
ACGKD_SHARED void add_scaled(Real factor, const Real* from, int64_t rank, Real* to) {
  for (int64_t k = 0; k < rank; ++k) to[k] += factor * from[k];
}

// target_clones does not reach templates, hence one overload per type.
#define ACGKD_FOR_TYPE(Real)                                                                                    \
  ACGKD_CLONES static void products_of(const Real* node, const Real* channels, int64_t stride, int64_t rank,     \
                                       Real bias, Real* theta) {                                                \
    products(node, channels, stride, rank, bias, theta);                                                        \
  }                                                                                                             \
  ACGKD_CLONES static Real product_of(const Real* a, const Real* b, int64_t rank) { return product(a, b, rank); } \
  ACGKD_CLONES static void add_to(Real factor, const Real* from, int64_t rank, Real* to) {                      \
    add_scaled(factor, from, rank, to);                                                                         \
  }
ACGKD_FOR_TYPE(float)
ACGKD_FOR_TYPE(double)

// Checked factors in the type of the arithmetic.
template <typename Stored>
struct Factors {
  using Real = WideOf<Stored>;

  Factors(const Layouts& layouts, const Tensor& z_tensor, const Tensor& bias_tensor)
      : rank(z_tensor.size(1)), z(z_tensor.numel()), bias(layouts.num_graphs) {
    const Stored *factors = read<Stored>(z_tensor), *shifts = read<Stored>(bias_tensor);
    for (size_t i = 0; i < z.size(); ++i) z[i] = static_cast<Real>(factors[i]);
    for (size_t g = 0; g < bias.size(); ++g) bias[g] = static_cast<Real>(shifts[g]);
  }

  const Real* node(int64_t i) const { return z.data() + i * rank; }

  int64_t rank;
  std::vector<Real> z, bias;
};

// Each graph's factors channel by channel, padded so that a block may read on behind the last node.
template <typename Stored>
class ChannelFactors {
  using Real = WideOf<Stored>;

 public:
  ChannelFactors(const Layouts& layouts, const Factors<Stored>& factors)
      : layouts_(layouts), factors_(factors), data_(factors.rank * (layouts.num_nodes + kLanes * layouts.num_graphs)) {
    torch::stable::parallel_for(0, layouts.num_graphs, 1, [&](int64_t begin, int64_t end) {
      for (int64_t g = begin; g < end; ++g) {
        const GraphLayout graph = layouts[g];
        Real* to = data_.data() + offset(graph, g);
        for (int64_t i = 0; i < graph.num_nodes; ++i) {
          const Real* node = factors.node(graph.first_node + i);
          for (int64_t k = 0; k < factors.rank; ++k) to[k * stride(graph) + i] = node[k];
        }
      }
    });
  }

  // As LogitSource asks: the pairs of a block follow one another row by row below the diagonal.
  void operator()(const GraphLayout& graph, int64_t first, int count, Real* theta) const {
    const int64_t g = layouts_.graph_of_node(graph.first_node);
    const Real* channels = data_.data() + offset(graph, g);
    Real row[kLanes];
    int64_t high = complete_high(first), low = first - triangle(high);
    int done = 0;
    for (; done < count; ++high, low = 0) {
      const int taken = static_cast<int>(std::min<int64_t>(high - low, count - done));
      products_of(factors_.node(graph.first_node + high), channels + low, stride(graph), factors_.rank,
                  factors_.bias[g], row);
      std::copy_n(row, taken, theta + done);
      done += taken;
    }
    std::fill(theta + count, theta + kLanes, Real(0));
  }

 private:
  int64_t offset(const GraphLayout& graph, int64_t g) const { return factors_.rank * (graph.first_node + kLanes * g); }
  static int64_t stride(const GraphLayout& graph) { return graph.num_nodes + kLanes; }

  const Layouts& layouts_;
  const Factors<Stored>& factors_;
  std::vector<Real> data_;
};

Draw check_factors(const char* op, const Layouts& layouts, const Tensor& z, const Tensor& bias, const Tensor& rng,
                   const Tensor& temperature, int64_t estimator, int64_t noise, double absent_rate) {
  check(op, "z", z, z.scalar_type(), {layouts.num_nodes, kAny});
  check(op, "bias", bias, z.scalar_type(), {layouts.num_graphs});
  STD_TORCH_CHECK(estimator == kStraightThrough || estimator == kSparseStraightThrough, op,
                  ": estimator: expected 2 or 3, got ", estimator);
  return make_draw(op, rng, temperature, estimator, noise, 0.0, 1.0, absent_rate);
}

SampleTensors sample_factor_edges(const Tensor& z, const Tensor& bias, const Tensor& table, const Tensor& rng,
                                  const Tensor& temperature, int64_t estimator, int64_t noise, double absent_rate,
                                  int64_t num_pairs, int64_t capacity) {
  const char* op = "sample_factor_edges";
  const Layouts layouts(op, table, 0);
  STD_TORCH_CHECK(num_pairs == layouts.num_pairs, op, ": num_pairs: expected ", layouts.num_pairs, ", got ", num_pairs);
  const Draw draw = check_factors(op, layouts, z, bias, rng, temperature, estimator, noise, absent_rate);
  return by_dtype(op, z, [&](auto* type) {
    using Stored = std::remove_pointer_t<decltype(type)>;
    const Factors<Stored> factors(layouts, z, bias);
    const ChannelFactors<Stored> source(layouts, factors);
    const LogitSource<WideOf<Stored>> logits = std::cref(source);
    return compact<Stored>(op, layouts, draw_pairs(logits, layouts, draw), z, table, capacity);
  });
}

std::tuple<Tensor, Tensor> sample_factor_edges_backward(const Tensor& grad_value, const Tensor& rowptr,
                                                        const Tensor& col, const Tensor& pair, const Tensor& z,
                                                        const Tensor& bias, const Tensor& table, const Tensor& rng,
                                                        const Tensor& temperature, int64_t estimator, int64_t noise,
                                                        double absent_rate) {
  const char* op = "sample_factor_edges_backward";
  const Layouts layouts(op, table, 0);
  const Draw draw = check_factors(op, layouts, z, bias, rng, temperature, estimator, noise, absent_rate);
  const Matrix sample(op, rowptr, col, layouts.num_nodes);
  check(op, "grad_value", grad_value, z.scalar_type(), {col.size(0)});
  check(op, "pair", pair, ScalarType::Long, {col.size(0)});
  const int64_t* pairs = read<int64_t>(pair);
  check_range(op, "pair", pairs, sample.num_entries, layouts.num_pairs);
  const Tensor grad_z = new_tensor(z, {z.size(0), z.size(1)}, z.scalar_type());
  const Tensor grad_bias = new_tensor(bias, {layouts.num_graphs}, bias.scalar_type());

  by_dtype(op, z, [&](auto* type) {
    using Stored = std::remove_pointer_t<decltype(type)>;
    using Real = WideOf<Stored>;
    const Factors<Stored> factors(layouts, z, bias);
    const Stored* grad = read<Stored>(grad_value);
    // d loss / d logit at both entries of a pair, and its sum over the smaller partners of each node.
    std::vector<Real> grad_theta(sample.num_entries), below(layouts.num_nodes);
    torch::stable::parallel_for(0, layouts.num_nodes, sample.rows_per_task(64), [&](int64_t begin, int64_t end) {
      Batch<Real> batch;
      int64_t g = layouts.graph_of_node(begin);
      GraphLayout graph = layouts[g];
      for (int64_t row = begin; row < end; ++row) {
        while (row >= graph.first_node + graph.num_nodes) graph = layouts[++g];
        for (int64_t e = sample.rowptr[row]; e < sample.rowptr[row + 1]; ++e) {
          const Real total = static_cast<Real>(grad[e]) + mirrored_grad(sample, pairs, grad, row, e, graph.first_node);
          const Real theta =
              factors.bias[g] + product_of(factors.node(row), factors.node(sample.col[e]), factors.rank);
          batch.add(graph, pairs[e] - graph.first_pair, e, theta, total);
          if (batch.size == kLanes) flush(draw, batch, grad_theta.data());
        }
      }
      flush(draw, batch, grad_theta.data());
    });
    Stored* out = write<Stored>(grad_z);
    torch::stable::parallel_for(0, layouts.num_nodes, sample.rows_per_task(factors.rank), [&](int64_t begin, int64_t end) {
      std::vector<Real> total(factors.rank);
      for (int64_t row = begin; row < end; ++row) {
        std::fill(total.begin(), total.end(), Real(0));
        below[row] = 0;
        for (int64_t e = sample.rowptr[row]; e < sample.rowptr[row + 1]; ++e) {
          add_to(grad_theta[e], factors.node(sample.col[e]), factors.rank, total.data());
          if (sample.col[e] < row) below[row] += grad_theta[e];
        }
        for (int64_t k = 0; k < factors.rank; ++k) out[row * factors.rank + k] = static_cast<Stored>(total[k]);
      }
    });
    for (int64_t g = 0; g < layouts.num_graphs; ++g) {
      const GraphLayout graph = layouts[g];
      double total = 0;
      for (int64_t i = 0; i < graph.num_nodes; ++i) total += below[graph.first_node + i];
      write<Stored>(grad_bias)[g] = static_cast<Stored>(static_cast<Real>(total));
    }
  });
  return {grad_z, grad_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(acgkd_fast, CPU, m) {
  m.impl("sample_factor_edges", TORCH_BOX(&sample_factor_edges));
  m.impl("sample_factor_edges_backward", TORCH_BOX(&sample_factor_edges_backward));
}

}  // namespace acgkd
