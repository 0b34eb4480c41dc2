#include "cpu/search_rows.h"

#include <algorithm>

#include "cpu/search_network.h"
#include "cpu/simd.h"

namespace acgkd {
namespace {

// 6 rows x 16 channels: 12 accumulators, as many as 16 registers leave room for and 2 units of latency 4 need.
constexpr int64_t kBlockRows = 6;
static_assert(kTile == 2 * kWidth<float> || kTile == 4 * kWidth<float>);

template <int kRows>
ACGKD_SHARED void multiply_block(const float* const* in, int64_t inputs, const float* weight, const float* bias,
                                 int64_t stride, float* const* out) {
  constexpr int kVectors = 2;
  constexpr int64_t kColumns = kVectors * kWidth<float>;
  for (int64_t column = 0; column < stride; column += kColumns) {
    Vec<float> total[kRows][kVectors];
    for (int v = 0; v < kVectors; ++v) {
      const Vec<float> start = bias ? load(bias + column + v * kWidth<float>) : Vec<float>{};
      for (int r = 0; r < kRows; ++r) total[r][v] = start;
    }
    const float* w = weight + column;
    for (int64_t k = 0; k < inputs; ++k, w += stride) {
      const Vec<float> w0 = load(w), w1 = load(w + kWidth<float>);
      for (int r = 0; r < kRows; ++r) {
        total[r][0] += in[r][k] * w0;
        total[r][1] += in[r][k] * w1;
      }
    }
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kVectors; ++v) store(out[r] + column + v * kWidth<float>, total[r][v], kWidth<float>);
    }
  }
}

// Spelt out, because __builtin_convertvector takes half a vector apart.
ACGKD_SHARED Vec<double> widened(const float* from) {
  if constexpr (kWidth<double> == 4) return Vec<double>{from[0], from[1], from[2], from[3]};
  else return Vec<double>{from[0], from[1]};
}

// Channels outside, rows inside, so that the sums stay in registers.
template <bool kResidual>
ACGKD_SHARED void activate_blocks(const Activation* rows, int64_t count, const float* scale, const float* shift,
                                  int64_t stride, double* first, double* second) {
  constexpr int kVectors = 2, kDoubles = 2 * kVectors;
  for (int64_t column = 0; column < stride; column += kVectors * kWidth<float>) {
    Vec<double> sum[kDoubles], square[kDoubles];
    for (int d = 0; d < kDoubles; ++d) {
      sum[d] = load(first + column + d * kWidth<double>);
      square[d] = load(second + column + d * kWidth<double>);
    }
    Vec<float> factor[kVectors], offset[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      factor[v] = load(scale + column + v * kWidth<float>);
      offset[v] = load(shift + column + v * kWidth<float>);
    }
    for (int64_t r = 0; r < count; ++r) {
      const Activation& row = rows[r];
      for (int d = 0; d < kDoubles; ++d) {
        const int64_t at = column + d * kWidth<double>;
        const Vec<double> now = widened(row.fresh + at), before = widened(row.old + at);
        sum[d] += now - before;
        square[d] += now * now - before * before;
      }
      for (int v = 0; v < kVectors; ++v) {
        const int64_t at = column + v * kWidth<float>;
        const Vec<float> value = load(row.fresh + at) * factor[v] + offset[v];
        // In this order a NaN stays one.
        Vec<float> out = value < 0.0f ? Vec<float>{} : value;
        if (kResidual) out += load(row.residual + at);
        store(row.out + at, out, kWidth<float>);
      }
    }
    for (int d = 0; d < kDoubles; ++d) {
      store(first + column + d * kWidth<double>, sum[d], kWidth<double>);
      store(second + column + d * kWidth<double>, square[d], kWidth<double>);
    }
  }
}

}  // namespace

ACGKD_CLONES void multiply_rows(const float* const* in, int64_t rows, int64_t inputs, const float* weight,
                                const float* bias, int64_t stride, float* const* out) {
  // Blocks of equal size: a single row left over would wait for its own additions.
  const int64_t blocks = (rows + kBlockRows - 1) / kBlockRows;
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t first = rows * b / blocks, count = rows * (b + 1) / blocks - first;
    switch (count) {
      case 1: multiply_block<1>(in + first, inputs, weight, bias, stride, out + first); break;
      case 2: multiply_block<2>(in + first, inputs, weight, bias, stride, out + first); break;
      case 3: multiply_block<3>(in + first, inputs, weight, bias, stride, out + first); break;
      case 4: multiply_block<4>(in + first, inputs, weight, bias, stride, out + first); break;
      case 5: multiply_block<5>(in + first, inputs, weight, bias, stride, out + first); break;
      default: multiply_block<6>(in + first, inputs, weight, bias, stride, out + first);
    }
  }
}

ACGKD_CLONES void gather_row(const float* self, float self_weight, const float* const* others, const float* weights,
                             int64_t count, float scale, const float* bias, int64_t stride, float* out) {
  for_runs<float>(stride, [&](auto run, int64_t first) __attribute__((always_inline)) {
    constexpr int kCount = decltype(run)::kCount;
    Vec<float> total[kCount];
    for (int k = 0; k < kCount; ++k) total[k] = self_weight * load(self + first + k * kWidth<float>);
    for (int64_t j = 0; j < count; ++j) {
      const float* other = others[j] + first;
      for (int k = 0; k < kCount; ++k) total[k] += weights[j] * load(other + k * kWidth<float>);
    }
    for (int k = 0; k < kCount; ++k) {
      const int64_t at = first + k * kWidth<float>;
      store(out + at, scale * total[k] + load(bias + at), kWidth<float>);
    }
  });
}

ACGKD_CLONES void activate_rows(const Activation* rows, int64_t count, const float* scale, const float* shift,
                                int64_t stride, double* first, double* second) {
  if (count == 0) return;
  rows[0].residual ? activate_blocks<true>(rows, count, scale, shift, stride, first, second)
                   : activate_blocks<false>(rows, count, scale, shift, stride, first, second);
}

ACGKD_CLONES void add_row(const float* __restrict row, int64_t stride, float* __restrict total) {
  for (int64_t k = 0; k < stride; ++k) total[k] += row[k];
}

ACGKD_CLONES void max_row(const float* __restrict row, int64_t stride, float* __restrict largest) {
  for (int64_t k = 0; k < stride; ++k) largest[k] = row[k] <= largest[k] ? largest[k] : row[k];
}

ACGKD_CLONES double dot(const double* a, const double* b, int64_t count) {
  // Fixed partial sums: the compiler may not reorder a single one.
  double part[8] = {};
  for (int64_t k = 0; k < count; k += 8) {
    for (int64_t i = 0; i < 8; ++i) part[i] += a[k + i] * b[k + i];
  }
  return ((part[0] + part[4]) + (part[1] + part[5])) + ((part[2] + part[6]) + (part[3] + part[7]));
}

}  // namespace acgkd
