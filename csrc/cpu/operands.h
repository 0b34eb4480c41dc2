// Node features together with the checked sparse matrix that carries them.
#pragma once

#include <optional>

#include "cpu/matrix.h"

namespace acgkd {

// A and its transpose; tied where the transpose is not given.
struct Operands {
  Operands(const char* op, const Tensor& x, const Tensor& value, const Tensor& rowptr_tensor, const Tensor& col_tensor,
           const std::optional<Tensor>& t_rowptr, const std::optional<Tensor>& t_col,
           const std::optional<Tensor>& t_edge, const char* name = "x")
      : rows(checked_rows(op, name, x)), width(x.size(1)), matrix(op, rowptr_tensor, col_tensor, rows), transpose(matrix) {
    check(op, "value", value, x.scalar_type(), {col_tensor.size(0)});
    const bool given = t_rowptr.has_value();
    STD_TORCH_CHECK(t_col.has_value() == given && t_edge.has_value() == given, op,
                    ": t_rowptr, t_col, t_edge: expected all or none of them, got some");
    if (!given) return;
    transpose = Matrix(op, *t_rowptr, *t_col, rows, "t_");
    check(op, "t_edge", *t_edge, ScalarType::Int, {t_col->size(0)});
    edge = read<int32_t>(*t_edge);
    check_range(op, "t_edge", edge, transpose.num_entries, matrix.num_entries);
    STD_TORCH_CHECK(transpose.num_entries == matrix.num_entries, op, ": t_rowptr: expected ", matrix.num_entries,
                    " entries as in the matrix, got ", transpose.num_entries);
  }

  int64_t rows, width;
  Matrix matrix, transpose;
  const int32_t* edge = nullptr;

 private:
  static int64_t checked_rows(const char* op, const char* name, const Tensor& x) {
    check(op, name, x, x.scalar_type(), {kAny, kAny});
    return x.size(0);
  }
};

}  // namespace acgkd
