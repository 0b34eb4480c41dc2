// GCN and GIN message passing: the operators. The loops over rows are in rows.cpp.
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/operands.h"
#include "cpu/rows.h"

namespace acgkd {
namespace {

Tensor like(const Tensor& x) { return new_tensor(x, {x.size(0), x.size(1)}, x.scalar_type()); }

double read_eps(const char* op, const Tensor& eps) {
  STD_TORCH_CHECK(eps.numel() == 1 && eps.is_cpu(), op, ": eps: expected a cpu tensor with one element, got a ",
                  describe(eps));
  return by_dtype(op, eps, [&](auto* type) {
    return static_cast<double>(*read<std::remove_pointer_t<decltype(type)>>(eps));
  });
}

// scale = D^-1/2, 0 where D <= 0.
template <typename Stored>
void degree_scale(const Matrix& matrix, const Stored* value, bool add_self_loops, WideOf<Stored>* scale) {
  using Real = WideOf<Stored>;
  torch::stable::parallel_for(0, matrix.num_rows, matrix.rows_per_task(4), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      Real degree = 0;
      for (int32_t e = matrix.rowptr[row]; e < matrix.rowptr[row + 1]; ++e) degree += static_cast<Real>(value[e]);
      degree += add_self_loops ? Real(1) : Real(0);
      scale[row] = degree > Real(0) ? Real(1) / std::sqrt(degree) : Real(0);
    }
  });
}

template <typename Stored>
void run_forward(const Forward<Stored>& task) {
  torch::stable::parallel_for(0, task.matrix.num_rows, task.matrix.rows_per_task(task.x.width()),
                              [&](int64_t begin, int64_t end) { forward_rows(task, begin, end); });
}

template <typename Stored>
void run_backward(const Backward<Stored>& task, const Matrix& matrix, int64_t length) {
  torch::stable::parallel_for(0, matrix.num_rows, matrix.rows_per_task(2 * task.x.width()),
                              [&](int64_t begin, int64_t end) { backward_rows(task, begin, end); });
  if (task.partial) {
    torch::stable::parallel_for(0, matrix.num_rows, matrix.rows_per_task(2), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        for (int32_t e = matrix.rowptr[row]; e < matrix.rowptr[row + 1]; ++e) {
          task.grad_value[e] = static_cast<Stored>(task.partial[e] + task.row_term[row]);
        }
      }
    });
  }
  std::fill(task.grad_value + matrix.num_entries, task.grad_value + length, Stored(0));
}

std::tuple<Tensor, Tensor> gcn_propagate(const Tensor& x, const Tensor& value, const std::optional<Tensor>& port,
                                         const std::optional<Tensor>& table, const Tensor& rowptr, const Tensor& col,
                                         const std::optional<Tensor>& t_rowptr, const std::optional<Tensor>& t_col,
                                         const std::optional<Tensor>& t_edge, bool add_self_loops, int64_t kind) {
  const char* op = "gcn_propagate";
  const Operands operands(op, x, value, rowptr, col, t_rowptr, t_col, t_edge);
  const Tensor out = like(x);
  const Tensor scale = new_tensor(x, {operands.rows}, wide_type(x.scalar_type()));
  by_dtype(op, x, [&](auto* type) {
    using Stored = std::remove_pointer_t<decltype(type)>;
    using Real = WideOf<Stored>;
    degree_scale(operands.matrix, read<Stored>(value), add_self_loops, write<Real>(scale));
    run_forward(Forward<Stored>{operands.matrix, read<Stored>(value), read<Real>(scale),
                                {read<Stored>(x), operands.rows, operands.width},
                                Real(add_self_loops), write<Stored>(out)});
  });
  return {out, scale};
}

std::tuple<Tensor, Tensor, Tensor> gcn_propagate_backward(
    const Tensor& grad_out, const Tensor& x, const Tensor& out, const Tensor& value, const Tensor& scale,
    const Tensor& rowptr, const Tensor& col, const std::optional<Tensor>& t_rowptr, const std::optional<Tensor>& t_col,
    const std::optional<Tensor>& t_edge, bool add_self_loops) {
  const char* op = "gcn_propagate_backward";
  const Operands operands(op, x, value, rowptr, col, t_rowptr, t_col, t_edge);
  const int64_t rows = operands.rows, width = operands.width, length = value.size(0);
  const ScalarType wide = wide_type(x.scalar_type());
  check(op, "grad_out", grad_out, x.scalar_type(), {rows, width});
  check(op, "out", out, x.scalar_type(), {rows, width});
  check(op, "scale", scale, wide, {rows});
  const Tensor grad_x = like(x);
  const Tensor grad_value = new_tensor(value, {length}, value.scalar_type());
  const Tensor grad_degree = new_tensor(x, {rows}, wide);
  by_dtype(op, x, [&](auto* type) {
    using Stored = std::remove_pointer_t<decltype(type)>;
    using Real = WideOf<Stored>;
    // Partial sums stay in full precision: in place where the gradient itself has it.
    constexpr bool kInPlace = std::is_same_v<Stored, Real>;
    std::vector<Real> scratch(operands.edge && !kInPlace ? length : 0);
    Real* partial = nullptr;
    if (operands.edge) partial = kInPlace ? write<Real>(grad_value) : scratch.data();
    run_backward(Backward<Stored>{operands.transpose, operands.edge, read<Stored>(value), read<Real>(scale),
                                  {read<Stored>(grad_out), rows, width}, {read<Stored>(x), rows, width},
                                  {read<Stored>(out), rows, width}, Real(add_self_loops), write<Stored>(grad_x),
                                  write<Stored>(grad_value), partial, write<Real>(grad_degree)},
                 operands.matrix, length);
  });
  return {grad_x, grad_value, grad_degree};
}

Tensor gin_propagate(const Tensor& x, const Tensor& value, const Tensor& eps, const std::optional<Tensor>& port,
                     const std::optional<Tensor>& table, const Tensor& rowptr, const Tensor& col,
                     const std::optional<Tensor>& t_rowptr, const std::optional<Tensor>& t_col,
                     const std::optional<Tensor>& t_edge, int64_t kind) {
  const char* op = "gin_propagate";
  const Operands operands(op, x, value, rowptr, col, t_rowptr, t_col, t_edge);
  const double self = 1.0 + read_eps(op, eps);
  const Tensor out = like(x);
  by_dtype(op, x, [&](auto* type) {
    using Stored = std::remove_pointer_t<decltype(type)>;
    using Real = WideOf<Stored>;
    run_forward(Forward<Stored>{operands.matrix, read<Stored>(value), nullptr,
                                {read<Stored>(x), operands.rows, operands.width}, static_cast<Real>(self),
                                write<Stored>(out)});
  });
  return out;
}

// The order of summation depends on the number of rows only.
template <typename Real>
double total_of(const std::vector<Real>& terms) {
  double total = 0;
  for (const Real term : terms) total += term;
  return total;
}

std::tuple<Tensor, Tensor, Tensor> gin_propagate_backward(const Tensor& grad_out, const Tensor& x, const Tensor& value,
                                                          const Tensor& eps, const Tensor& rowptr, const Tensor& col,
                                                          const std::optional<Tensor>& t_rowptr,
                                                          const std::optional<Tensor>& t_col,
                                                          const std::optional<Tensor>& t_edge) {
  const char* op = "gin_propagate_backward";
  const Operands operands(op, x, value, rowptr, col, t_rowptr, t_col, t_edge);
  const int64_t rows = operands.rows, width = operands.width, length = value.size(0);
  check(op, "grad_out", grad_out, x.scalar_type(), {rows, width});
  const double self = 1.0 + read_eps(op, eps);
  const Tensor grad_x = like(x);
  const Tensor grad_value = new_tensor(value, {length}, value.scalar_type());
  const Tensor grad_eps = torch::stable::empty_like(eps);
  by_dtype(op, x, [&](auto* type) {
    using Stored = std::remove_pointer_t<decltype(type)>;
    using Real = WideOf<Stored>;
    std::vector<Real> row_dot(rows);
    run_backward(Backward<Stored>{operands.transpose, operands.edge, read<Stored>(value), nullptr,
                                  {read<Stored>(grad_out), rows, width}, {read<Stored>(x), rows, width},
                                  {read<Stored>(x), rows, width}, static_cast<Real>(self), write<Stored>(grad_x),
                                  write<Stored>(grad_value), nullptr, row_dot.data()},
                 operands.matrix, length);
    by_dtype(op, eps, [&](auto* eps_type) {
      using Eps = std::remove_pointer_t<decltype(eps_type)>;
      *write<Eps>(grad_eps) = static_cast<Eps>(static_cast<WideOf<Eps>>(total_of(row_dot)));
    });
  });
  return {grad_x, grad_value, grad_eps};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(acgkd_fast, CPU, m) {
  m.impl("gcn_propagate", TORCH_BOX(&gcn_propagate));
  m.impl("gcn_propagate_backward", TORCH_BOX(&gcn_propagate_backward));
  m.impl("gin_propagate", TORCH_BOX(&gin_propagate));
  m.impl("gin_propagate_backward", TORCH_BOX(&gin_propagate_backward));
}

}  // namespace acgkd
