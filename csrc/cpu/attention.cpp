// Graph attention: the softmax of scores over a node's neighbours, and the sum that it weighs.
#include <algorithm>
#include <limits>
#include <tuple>
#include <vector>

#include "cpu/operands.h"
#include "cpu/simd.h"

namespace acgkd {
namespace {

// Scores of absent edges may lie above the largest of those that are there; beyond this e^x is of no use.
constexpr double kSteepest = 30;

// What both directions read. Rows of `sent` and of gradients are those of a node's heads, one after the other; scores,
// `highest` and `total` have a number each for them.
template <typename Stored>
struct Attention {
  using Real = WideOf<Stored>;
  int64_t heads;
  Features<Stored, Real> sent;
  const Stored *source, *target, *value;
  Real slope;
  bool loops;

  ACGKD_SHARED Real before_slope(int64_t receiver, int64_t sender) const {
    return static_cast<Real>(source[sender]) + static_cast<Real>(target[receiver]);
  }

  ACGKD_SHARED Real score(int64_t receiver, int64_t sender) const {
    const Real e = before_slope(receiver, sender);
    return e > 0 ? e : slope * e;
  }

  ACGKD_SHARED Real slope_at(int64_t receiver, int64_t sender) const {
    return before_slope(receiver, sender) > 0 ? Real(1) : slope;
  }
};

// e^x of a score less the largest.
template <typename Real>
ACGKD_SHARED Real share(Real shifted) {
  return exponential(shifted > Real(kSteepest) ? Real(kSteepest) : shifted);
}

// In a loop of its own, which is vectorised.
template <typename Real>
ACGKD_SHARED void share_all(Real* shifted, int64_t count) {
  for (int64_t k = 0; k < count; ++k) shifted[k] = share(shifted[k]);
}

template <typename Stored>
struct Forward : Attention<Stored> {
  using Real = WideOf<Stored>;
  Matrix matrix;
  Stored* out;
  Real *highest, *total;
};

template <typename Stored>
ACGKD_SHARED void forward(const Forward<Stored>& task, WideOf<Stored>* weights, int64_t begin, int64_t end) {
  using Real = WideOf<Stored>;
  constexpr Real kNone = -std::numeric_limits<Real>::infinity();
  for (int64_t row = begin; row < end; ++row) {
    const int32_t first_entry = task.matrix.rowptr[row];
    const int64_t count = task.matrix.rowptr[row + 1] - first_entry;
    for (int64_t head = 0; head < task.heads; ++head) {
      const int64_t at = row * task.heads + head;
      // The largest score among edges that are there, else among all; 0 where there are none.
      const Real own_score = task.score(at, at);
      Real present = task.loops ? own_score : kNone;
      Real any = present;
      for (int64_t k = 0; k < count; ++k) {
        const Real score = task.score(at, task.matrix.col[first_entry + k] * task.heads + head);
        weights[k] = score;
        any = std::max(any, score);
        if (static_cast<Real>(task.value[first_entry + k]) != 0) present = std::max(present, score);
      }
      const Real highest = present != kNone ? present : any != kNone ? any : Real(0);
      for (int64_t k = 0; k < count; ++k) weights[k] -= highest;
      share_all(weights, count);
      const Real own = task.loops ? share(own_score - highest) : Real(0);
      Real total = own;
      for (int64_t k = 0; k < count; ++k) {
        weights[k] *= static_cast<Real>(task.value[first_entry + k]);
        total += weights[k];
      }
      // Where nothing is, an edge of weight 1 would have all the attention: its slope there is that step.
      total = total == 0 ? Real(1) : total;
      task.highest[at] = highest;
      task.total[at] = total;
      for_runs<Real>(task.sent.width(), [&](auto run, int64_t first) __attribute__((always_inline)) {
        constexpr int kCount = decltype(run)::kCount;
        Vec<Real> sum[kCount], x[kCount];
        task.sent.read(run, at, first, x);
        // Not 0 * x, which is NaN where x is infinite.
        for (int k = 0; k < kCount; ++k) sum[k] = task.loops ? own * x[k] : Vec<Real>{};
        for (int64_t e = 0; e < count; ++e) {
          task.sent.read(run, task.matrix.col[first_entry + e] * task.heads + head, first, x);
          for (int k = 0; k < kCount; ++k) sum[k] += weights[e] * x[k];
        }
        for (int k = 0; k < kCount; ++k) sum[k] /= total;
        task.sent.write(run, task.out, at, first, sum);
      });
    }
  }
}

template <typename Stored>
struct Backward : Attention<Stored> {
  using Real = WideOf<Stored>;
  Matrix matrix, transpose;
  // Position in the matrix of each entry of its transpose; null if they are the same.
  const int32_t* edge;
  const Real *highest, *total;
  Features<Stored, Real> grad_out, out;
  // <grad_out, out> of every head, which receivers leave to senders, and d loss / d score of its self-loop.
  Real *paired, *own_slope;
  Stored *grad_sent, *grad_source, *grad_target, *grad_value;

  // Attention of a node to itself.
  ACGKD_SHARED Real own(int64_t node) const {
    return this->loops ? share(this->score(node, node) - highest[node]) / total[node] : Real(0);
  }
};

template <typename Stored>
ACGKD_SHARED WideOf<Stored> dot(const Features<Stored, WideOf<Stored>>& left, int64_t left_row,
                                const Features<Stored, WideOf<Stored>>& right, int64_t right_row) {
  using Real = WideOf<Stored>;
  Real total = 0;
  for_runs<Real>(left.width(), [&](auto run, int64_t first) __attribute__((always_inline)) {
    constexpr int kCount = decltype(run)::kCount;
    Vec<Real> a[kCount], b[kCount];
    Vec<Real> products = {};
    left.read(run, left_row, first, a);
    right.read(run, right_row, first, b);
    for (int k = 0; k < kCount; ++k) products += a[k] * b[k];
    total += sum<Real>(products);
  });
  return total;
}

// Gradients of the targets and of the entries. `scratch` holds two numbers per entry of a row.
template <typename Stored>
ACGKD_SHARED void receivers(const Backward<Stored>& task, WideOf<Stored>* scratch, int64_t begin, int64_t end) {
  using Real = WideOf<Stored>;
  for (int64_t row = begin; row < end; ++row) {
    const int32_t first_entry = task.matrix.rowptr[row];
    const int64_t count = task.matrix.rowptr[row + 1] - first_entry;
    // Attention at weight 1, of one head, and the gradients of the entries, over all heads.
    Real *steps = scratch, *slopes = scratch + count;
    std::fill_n(slopes, count, Real(0));
    for (int64_t head = 0; head < task.heads; ++head) {
      const int64_t at = row * task.heads + head;
      const Real paired = dot(task.grad_out, at, task.out, at);
      const Real own = task.own(at) * (dot(task.grad_out, at, task.sent, at) - paired) * task.slope_at(at, at);
      for (int64_t k = 0; k < count; ++k) {
        steps[k] = task.score(at, task.matrix.col[first_entry + k] * task.heads + head) - task.highest[at];
      }
      share_all(steps, count);
      Real target = own;
      for (int64_t k = 0; k < count; ++k) {
        const int64_t sender = task.matrix.col[first_entry + k] * task.heads + head;
        const Real slope = steps[k] / task.total[at] * (dot(task.grad_out, at, task.sent, sender) - paired);
        slopes[k] += slope;
        target += static_cast<Real>(task.value[first_entry + k]) * slope * task.slope_at(at, sender);
      }
      task.paired[at] = paired;
      task.own_slope[at] = own;
      task.grad_target[at] = static_cast<Stored>(target);
    }
    for (int64_t k = 0; k < count; ++k) task.grad_value[first_entry + k] = static_cast<Stored>(slopes[k]);
  }
}

// Gradients of what is sent and of the sources, after `receivers`.
template <typename Stored>
ACGKD_SHARED void senders(const Backward<Stored>& task, WideOf<Stored>* weights, int64_t begin, int64_t end) {
  using Real = WideOf<Stored>;
  for (int64_t row = begin; row < end; ++row) {
    const int32_t first_entry = task.transpose.rowptr[row];
    const int64_t count = task.transpose.rowptr[row + 1] - first_entry;
    for (int64_t head = 0; head < task.heads; ++head) {
      const int64_t at = row * task.heads + head;
      const auto receiver = [&](int64_t k) __attribute__((always_inline)) {
        return task.transpose.col[first_entry + k] * task.heads + head;
      };
      for (int64_t k = 0; k < count; ++k) weights[k] = task.score(receiver(k), at) - task.highest[receiver(k)];
      share_all(weights, count);
      Real source = task.own_slope[at];
      for (int64_t k = 0; k < count; ++k) {
        const int64_t entry = task.edge ? task.edge[first_entry + k] : first_entry + k, to = receiver(k);
        weights[k] *= static_cast<Real>(task.value[entry]) / task.total[to];
        source += weights[k] * (dot(task.grad_out, to, task.sent, at) - task.paired[to]) * task.slope_at(to, at);
      }
      task.grad_source[at] = static_cast<Stored>(source);
      const Real own = task.own(at);
      for_runs<Real>(task.sent.width(), [&](auto run, int64_t first) __attribute__((always_inline)) {
        constexpr int kCount = decltype(run)::kCount;
        Vec<Real> sum[kCount], grad[kCount];
        task.grad_out.read(run, at, first, grad);
        for (int k = 0; k < kCount; ++k) sum[k] = task.loops ? own * grad[k] : Vec<Real>{};
        for (int64_t e = 0; e < count; ++e) {
          task.grad_out.read(run, receiver(e), first, grad);
          for (int k = 0; k < kCount; ++k) sum[k] += weights[e] * grad[k];
        }
        task.sent.write(run, task.grad_sent, at, first, sum);
      });
    }
  }
}

// target_clones does not reach templates, hence one overload per type.
#define ACGKD_FOR_TYPE(Stored)                                                                                     \
  ACGKD_CLONES static void forward_rows(const Forward<Stored>& task, WideOf<Stored>* scratch, int64_t begin,       \
                                        int64_t end) {                                                             \
    forward(task, scratch, begin, end);                                                                            \
  }                                                                                                                \
  ACGKD_CLONES static void receiver_rows(const Backward<Stored>& task, WideOf<Stored>* scratch, int64_t begin,     \
                                         int64_t end) {                                                            \
    receivers(task, scratch, begin, end);                                                                          \
  }                                                                                                                \
  ACGKD_CLONES static void sender_rows(const Backward<Stored>& task, WideOf<Stored>* scratch, int64_t begin,       \
                                       int64_t end) {                                                              \
    senders(task, scratch, begin, end);                                                                            \
  }
ACGKD_FOR_TYPE(float)
ACGKD_FOR_TYPE(double)
ACGKD_FOR_TYPE(BFloat16)
#undef ACGKD_FOR_TYPE

// Calls rows(scratch for two numbers per entry of the longest row, begin, end) for all rows of a matrix.
template <typename Real, typename Function>
void over_rows(const Matrix& matrix, int64_t cost, const Function& rows) {
  torch::stable::parallel_for(0, matrix.num_rows, matrix.rows_per_task(cost), [&](int64_t begin, int64_t end) {
    std::vector<Real> scratch(2 * matrix.longest_row(begin, end));
    rows(scratch.data(), begin, end);
  });
}

// Checked arguments that both directions have.
struct AttentionOperands : Operands {
  AttentionOperands(const char* op, const Tensor& sent, const Tensor& source, const Tensor& target, const Tensor& value,
                    const Tensor& rowptr, const Tensor& col, const std::optional<Tensor>& t_rowptr,
                    const std::optional<Tensor>& t_col, const std::optional<Tensor>& t_edge)
      : Operands(op, sent, value, rowptr, col, t_rowptr, t_col, t_edge, "sent") {
    check(op, "source", source, sent.scalar_type(), {rows, kAny});
    heads = source.size(1);
    STD_TORCH_CHECK(heads >= 1 && width % heads == 0, op, ": source: expected a number of heads that divides ", width,
                    ", got ", heads);
    check(op, "target", target, sent.scalar_type(), {rows, heads});
  }

  template <typename Stored>
  Features<Stored, WideOf<Stored>> by_heads(const Tensor& features) const {
    return {read<Stored>(features), rows * heads, width / heads};
  }

  template <typename Stored>
  Attention<Stored> attention(const Tensor& sent, const Tensor& source, const Tensor& target, const Tensor& value,
                              double negative_slope, bool add_self_loops) const {
    return {heads,
            by_heads<Stored>(sent),
            read<Stored>(source),
            read<Stored>(target),
            read<Stored>(value),
            static_cast<WideOf<Stored>>(negative_slope),
            add_self_loops};
  }

  int64_t heads;
};

std::tuple<Tensor, Tensor, Tensor> gat_propagate(const Tensor& sent, const Tensor& source, const Tensor& target,
                                                 const Tensor& value, const Tensor& rowptr, const Tensor& col,
                                                 const std::optional<Tensor>& t_rowptr,
                                                 const std::optional<Tensor>& t_col,
                                                 const std::optional<Tensor>& t_edge, double negative_slope,
                                                 bool add_self_loops) {
  const char* op = "gat_propagate";
  const AttentionOperands operands(op, sent, source, target, value, rowptr, col, t_rowptr, t_col, t_edge);
  const int64_t rows = operands.rows, heads = operands.heads;
  const ScalarType wide = wide_type(sent.scalar_type());
  const Tensor out = new_tensor(sent, {rows, operands.width}, sent.scalar_type());
  const Tensor highest = new_tensor(sent, {rows, heads}, wide), total = new_tensor(sent, {rows, heads}, wide);
  by_dtype(op, sent, [&](auto* type) {
    using Stored = std::remove_pointer_t<decltype(type)>;
    using Real = WideOf<Stored>;
    const auto shared = operands.attention<Stored>(sent, source, target, value, negative_slope, add_self_loops);
    const Forward<Stored> task{shared, operands.matrix, write<Stored>(out), write<Real>(highest), write<Real>(total)};
    over_rows<Real>(operands.matrix, operands.width + 16 * heads, [&](Real* scratch, int64_t begin, int64_t end) {
      forward_rows(task, scratch, begin, end);
    });
  });
  return {out, highest, total};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gat_propagate_backward(
    const Tensor& grad_out, const Tensor& sent, const Tensor& source, const Tensor& target, const Tensor& value,
    const Tensor& out, const Tensor& highest, const Tensor& total, const Tensor& rowptr, const Tensor& col,
    const std::optional<Tensor>& t_rowptr, const std::optional<Tensor>& t_col, const std::optional<Tensor>& t_edge,
    double negative_slope, bool add_self_loops) {
  const char* op = "gat_propagate_backward";
  const AttentionOperands operands(op, sent, source, target, value, rowptr, col, t_rowptr, t_col, t_edge);
  const int64_t rows = operands.rows, heads = operands.heads, length = value.size(0);
  const ScalarType stored = sent.scalar_type(), wide = wide_type(stored);
  check(op, "grad_out", grad_out, stored, {rows, operands.width});
  check(op, "out", out, stored, {rows, operands.width});
  check(op, "highest", highest, wide, {rows, heads});
  check(op, "total", total, wide, {rows, heads});
  const Tensor grad_sent = new_tensor(sent, {rows, operands.width}, stored);
  const Tensor grad_source = new_tensor(sent, {rows, heads}, stored);
  const Tensor grad_target = new_tensor(sent, {rows, heads}, stored);
  const Tensor grad_value = new_tensor(value, {length}, stored);
  by_dtype(op, sent, [&](auto* type) {
    using Stored = std::remove_pointer_t<decltype(type)>;
    using Real = WideOf<Stored>;
    std::vector<Real> paired(rows * heads), own_slope(rows * heads);
    const auto shared = operands.attention<Stored>(sent, source, target, value, negative_slope, add_self_loops);
    const Backward<Stored> task{shared,
                                operands.matrix,
                                operands.transpose,
                                operands.edge,
                                read<Real>(highest),
                                read<Real>(total),
                                operands.by_heads<Stored>(grad_out),
                                operands.by_heads<Stored>(out),
                                paired.data(),
                                own_slope.data(),
                                write<Stored>(grad_sent),
                                write<Stored>(grad_source),
                                write<Stored>(grad_target),
                                write<Stored>(grad_value)};
    const int64_t cost = 2 * operands.width + 16 * heads;
    over_rows<Real>(operands.matrix, cost, [&](Real* scratch, int64_t begin, int64_t end) {
      receiver_rows(task, scratch, begin, end);
    });
    over_rows<Real>(operands.transpose, cost, [&](Real* scratch, int64_t begin, int64_t end) {
      sender_rows(task, scratch, begin, end);
    });
    std::fill(task.grad_value + operands.matrix.num_entries, task.grad_value + length, Stored(0));
  });
  return {grad_sent, grad_source, grad_target, grad_value};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(acgkd_fast, CPU, m) {
  m.impl("gat_propagate", TORCH_BOX(&gat_propagate));
  m.impl("gat_propagate_backward", TORCH_BOX(&gat_propagate_backward));
}

}  // namespace acgkd
