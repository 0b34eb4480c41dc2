#pragma once

#include <tuple>

#include "cpu/sample.h"

namespace acgkd {

// Value, rowptr, col, pair, needed: what the sampling operators return.
using SampleTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// Lays a drawn sample out in canonical CSR, values with the dtype of `like`; see acgkd_fast/edges/reference.py.
template <typename Stored>
SampleTensors compact(const char* op, const Layouts& layouts, const Drawn<WideOf<Stored>>& drawn, const Tensor& like,
                      const Tensor& table, int64_t capacity);

}  // namespace acgkd
