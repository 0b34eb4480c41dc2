// The arithmetic of the search and of frozen layers, row by row. Each row's bits do not depend on which rows are computed beside it.
#pragma once

#include <cstdint>

namespace acgkd {

// out[r] = in[r] W + b for scattered rows; `weight` [inputs, stride], `bias` may be null.
void multiply_rows(const float* const* in, int64_t rows, int64_t inputs, const float* weight, const float* bias,
                   int64_t stride, float* const* out);

// out = scale (self_weight self + sum_j weights_j others_j) + bias.
void gather_row(const float* self, float self_weight, const float* const* others, const float* weights, int64_t count,
                float scale, const float* bias, int64_t stride, float* out);

struct Activation {
  const float *fresh, *old, *residual;
  float* out;
};

// out = relu(fresh scale + shift) (+ residual), and first += fresh - old, second += fresh^2 - old^2, row by row. All
// rows have a residual or none has.
void activate_rows(const Activation* rows, int64_t count, const float* scale, const float* shift, int64_t stride,
                   double* first, double* second);

void add_row(const float* row, int64_t stride, float* total);
void max_row(const float* row, int64_t stride, float* largest);

double dot(const double* a, const double* b, int64_t count);

}  // namespace acgkd
