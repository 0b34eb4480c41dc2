// A checked sparse matrix in CSR form.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>

#include "cpu/tensors.h"

namespace acgkd {

// All of values[0 .. count - 1] lie in 0 .. bound - 1.
void check_range(const char* op, const char* name, const int32_t* values, int64_t count, int64_t bound);
void check_range(const char* op, const char* name, const int64_t* values, int64_t count, int64_t bound);

// Row r owns entries rowptr[r] .. rowptr[r + 1] - 1; what stands behind the last row is unused capacity.
struct Matrix {
  Matrix(const char* op, const Tensor& rowptr_tensor, const Tensor& col_tensor, int64_t num_rows,
         const char* prefix = "")
      : num_rows(num_rows) {
    const std::string rowptr_name = std::string(prefix) + "rowptr", col_name = std::string(prefix) + "col";
    check(op, rowptr_name.c_str(), rowptr_tensor, ScalarType::Int, {num_rows + 1});
    check(op, col_name.c_str(), col_tensor, ScalarType::Int, {kAny});
    rowptr = read<int32_t>(rowptr_tensor);
    col = read<int32_t>(col_tensor);
    num_entries = rowptr[num_rows];
    bool valid = rowptr[0] == 0 && num_entries <= col_tensor.size(0);
    for (int64_t row = 0; row < num_rows; ++row) valid &= rowptr[row] <= rowptr[row + 1];
    STD_TORCH_CHECK(valid, op, ": ", rowptr_name, ": expected offsets that rise from 0 to at most ", col_tensor.size(0),
                    ", got others");
    check_range(op, col_name.c_str(), col, num_entries, num_rows);
  }

  int64_t longest_row(int64_t begin, int64_t end) const {
    int64_t longest = 0;
    for (int64_t row = begin; row < end; ++row) longest = std::max<int64_t>(longest, rowptr[row + 1] - rowptr[row]);
    return longest;
  }

  // Grain for parallel loops over rows in which an entry costs about `cost` operations.
  int64_t rows_per_task(int64_t cost) const {
    const int64_t work = (num_entries + num_rows) * cost;
    return std::max<int64_t>(1, (int64_t(1) << 17) * num_rows / std::max<int64_t>(1, work));
  }

  int64_t num_rows, num_entries;
  const int32_t *rowptr, *col;
};

}  // namespace acgkd
