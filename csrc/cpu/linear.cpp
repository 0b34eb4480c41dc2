// frozen_linear: rows times a small constant matrix, whose packing would cost a general product a fifth of its time.
#include <algorithm>
#include <optional>
#include <vector>

#include "cpu/search_rows.h"
#include "cpu/tensors.h"

namespace acgkd {
namespace {

// Multiples of the block of rows; few enough that the pointers to them stay in the first-level cache.
constexpr int64_t kRowsAtOnce = 60;
constexpr int64_t kColumns = 16;

Tensor frozen_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, bool transposed) {
  const char* op = "frozen_linear";
  check(op, "weight", weight, ScalarType::Float, {kAny, kAny});
  const int64_t inputs = weight.size(transposed ? 0 : 1), outputs = weight.size(transposed ? 1 : 0);
  check(op, "x", x, ScalarType::Float, {kAny, inputs});
  if (bias.has_value()) check(op, "bias", *bias, ScalarType::Float, {outputs});
  STD_TORCH_CHECK(outputs % kColumns == 0, op, ": weight: expected outputs in multiples of ", kColumns, ", got ",
                  outputs);
  const int64_t rows = x.size(0);
  const Tensor out = new_tensor(x, {rows, outputs}, ScalarType::Float);
  const float *in = read<float>(x), *matrix = read<float>(weight), *shift = bias ? read<float>(*bias) : nullptr;
  std::vector<float> turned;
  if (!transposed) {
    turned.resize(inputs * outputs);
    for (int64_t o = 0; o < outputs; ++o) {
      for (int64_t i = 0; i < inputs; ++i) turned[i * outputs + o] = matrix[o * inputs + i];
    }
    matrix = turned.data();
  }
  float* to = write<float>(out);
  const int64_t blocks = (rows + kRowsAtOnce - 1) / kRowsAtOnce;
  torch::stable::parallel_for(0, blocks, 8, [&](int64_t begin, int64_t end) {
    const float* from[kRowsAtOnce];
    float* into[kRowsAtOnce];
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * kRowsAtOnce, count = std::min(kRowsAtOnce, rows - first);
      for (int64_t r = 0; r < count; ++r) {
        from[r] = in + (first + r) * inputs;
        into[r] = to + (first + r) * outputs;
      }
      multiply_rows(from, count, inputs, matrix, shift, outputs, into);
    }
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(acgkd_fast, CPU, m) { m.impl("frozen_linear", TORCH_BOX(&frozen_linear)); }

}  // namespace acgkd
