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

ACGKD_CLONES void activate_row(const float* __restrict fresh, const float* __restrict old,
                               const float* __restrict scale, const float* __restrict shift,
                               const float* __restrict residual, int64_t stride, float* __restrict out,
                               double* __restrict first, double* __restrict second) {
  for (int64_t k = 0; k < stride; ++k) {
    const double now = fresh[k], before = old[k];
    first[k] += now - before;
    second[k] += now * now - before * before;
  }
  for (int64_t k = 0; k < stride; ++k) {
    const float value = fresh[k] * scale[k] + shift[k];
    // In this order a NaN stays one.
    out[k] = value < 0.0f ? 0.0f : value;
  }
  if (!residual) return;
  for (int64_t k = 0; k < stride; ++k) out[k] += residual[k];
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
