// Message passing over a range of rows; see propagate.cpp for the operators.
#pragma once

#include <cstdint>

#include "cpu/matrix.h"
#include "cpu/simd.h"

namespace acgkd {

// out_i = scale_i (sum_j value_ij scale_j x_j + self_i x_i), with scale = 1 where it is null.
template <typename Stored>
struct Forward {
  using Real = WideOf<Stored>;
  Matrix matrix;
  const Stored* value;
  const Real* scale;
  Features<Stored, Real> x;
  // GCN: whether to add the identity; GIN: 1 + eps.
  Real self;
  Stored* out;
};

// One sweep over the rows of the transpose yields both gradients.
template <typename Stored>
struct Backward {
  using Real = WideOf<Stored>;
  Matrix transpose;
  // Position in A of each of its entries; null if A is its own transpose.
  const int32_t* edge;
  const Stored* value;
  const Real* scale;
  // `out` is the forward result, which only GCN needs.
  Features<Stored, Real> grad_out, x, out;
  Real self;
  Stored* grad_x;
  Stored* grad_value;
  // Entry gradients that still lack the degree term of their row in A; null where none is due (GIN) or where it
  // is known here (null `edge`).
  Real* partial;
  // dL/dD_i (GCN) or <grad_out_i, x_i> (GIN) of each row.
  Real* row_term;
};

template <typename Stored>
void forward_rows(const Forward<Stored>& task, int64_t begin, int64_t end);

template <typename Stored>
void backward_rows(const Backward<Stored>& task, int64_t begin, int64_t end);

}  // namespace acgkd
