// readout and its backward.
#include <algorithm>
#include <limits>
#include <tuple>
#include <vector>

#include "cpu/simd.h"
#include "cpu/tensors.h"

namespace acgkd {
namespace {

// Codes of acgkd_fast/propagate/reference.py.
enum Mode : int64_t { kSum = 0, kMean = 1, kMax = 2 };

// Checked node offsets of the graphs.
const int64_t* offsets(const char* op, const Tensor& ptr, int64_t mode, int64_t num_nodes) {
  STD_TORCH_CHECK(mode >= kSum && mode <= kMax, op, ": mode: expected 0, 1 or 2, got ", mode);
  check(op, "ptr", ptr, ScalarType::Long, {kAny});
  const int64_t graphs = ptr.size(0) - 1;
  const int64_t* nodes = read<int64_t>(ptr);
  bool valid = graphs >= 0 && nodes[0] == 0 && nodes[graphs] == num_nodes;
  for (int64_t g = 0; valid && g < graphs; ++g) valid = nodes[g] <= nodes[g + 1];
  STD_TORCH_CHECK(valid, op, ": ptr: expected offsets that rise from 0 to ", num_nodes, ", got others");
  return nodes;
}

int64_t graphs_per_task(int64_t graphs, int64_t elements) {
  return std::max<int64_t>(1, (int64_t(1) << 15) * graphs / std::max<int64_t>(1, elements));
}

template <typename Stored, typename Real>
ACGKD_SHARED void add_rows(const Stored* x, int64_t rows, int64_t width, Real* total) {
  std::fill_n(total, width, Real(0));
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t k = 0; k < width; ++k) total[k] += static_cast<Real>(x[row * width + k]);
  }
}

// First row that reaches the maximum; a NaN wins, and is then reached by no row, which `none` says.
template <typename Stored>
void max_rows(const Stored* x, int64_t begin, int64_t end, int64_t width, int32_t none, Stored* best, int32_t* argmax) {
  std::copy_n(x + begin * width, width, best);
  std::fill_n(argmax, width, static_cast<int32_t>(begin));
  for (int64_t row = begin; row < end; ++row) {
    for (int64_t k = 0; k < width; ++k) {
      const Stored value = x[row * width + k];
      if (value > best[k] || value != value) {
        best[k] = value;
        argmax[k] = static_cast<int32_t>(row);
      }
    }
  }
  for (int64_t k = 0; k < width; ++k) {
    if (best[k] != best[k]) argmax[k] = none;
  }
}

#define ACGKD_FOR_TYPE(Stored)                                                                            \
  ACGKD_CLONES static void sum_rows(const Stored* x, int64_t rows, int64_t width, WideOf<Stored>* total) { \
    add_rows(x, rows, width, total);                                                                      \
  }
ACGKD_FOR_TYPE(float)
ACGKD_FOR_TYPE(double)
ACGKD_FOR_TYPE(BFloat16)
#undef ACGKD_FOR_TYPE

std::tuple<Tensor, Tensor> readout(const Tensor& x, const Tensor& ptr, int64_t mode) {
  const char* op = "readout";
  check(op, "x", x, x.scalar_type(), {kAny, kAny});
  const int64_t* nodes = offsets(op, ptr, mode, x.size(0));
  const int64_t graphs = ptr.size(0) - 1, width = x.size(1);
  STD_TORCH_CHECK(x.size(0) <= std::numeric_limits<int32_t>::max(), op, ": x: expected at most 2^31 - 1 rows, got a ",
                  describe(x));
  const int32_t num_nodes = static_cast<int32_t>(x.size(0));
  const Tensor out = new_tensor(x, {graphs, width}, x.scalar_type());
  const Tensor argmax = new_tensor(ptr, {mode == kMax ? graphs : 0, width}, ScalarType::Int);
  by_dtype(op, x, [&](auto* type) {
    using Stored = std::remove_pointer_t<decltype(type)>;
    using Real = WideOf<Stored>;
    const Stored* data = read<Stored>(x);
    Stored* result = write<Stored>(out);
    int32_t* winners = write<int32_t>(argmax);
    torch::stable::parallel_for(0, graphs, graphs_per_task(graphs, x.numel()), [&](int64_t first, int64_t last) {
      std::vector<Real> total(width);
      for (int64_t g = first; g < last; ++g) {
        const int64_t begin = nodes[g], end = nodes[g + 1];
        if (mode == kMax && begin < end) {
          max_rows(data, begin, end, width, num_nodes, result + g * width, winners + g * width);
          continue;
        }
        if (mode == kMax) std::fill_n(winners + g * width, width, -1);
        sum_rows(data + begin * width, end - begin, width, total.data());
        const Real divisor = mode == kMean ? static_cast<Real>(std::max<int64_t>(1, end - begin)) : Real(1);
        for (int64_t k = 0; k < width; ++k) result[g * width + k] = static_cast<Stored>(total[k] / divisor);
      }
    });
  });
  return {out, argmax};
}

Tensor readout_backward(const Tensor& grad_out, const Tensor& argmax, const Tensor& ptr, int64_t mode,
                        int64_t num_nodes) {
  const char* op = "readout_backward";
  const int64_t* nodes = offsets(op, ptr, mode, num_nodes);
  const int64_t graphs = ptr.size(0) - 1;
  check(op, "grad_out", grad_out, grad_out.scalar_type(), {graphs, kAny});
  const int64_t width = grad_out.size(1);
  check(op, "argmax", argmax, ScalarType::Int, {mode == kMax ? graphs : 0, width});
  const Tensor grad_x = new_tensor(grad_out, {num_nodes, width}, grad_out.scalar_type());
  by_dtype(op, grad_out, [&](auto* type) {
    using Stored = std::remove_pointer_t<decltype(type)>;
    using Real = WideOf<Stored>;
    const Stored* incoming = read<Stored>(grad_out);
    const int32_t* winners = read<int32_t>(argmax);
    Stored* result = write<Stored>(grad_x);
    torch::stable::parallel_for(0, graphs, graphs_per_task(graphs, grad_x.numel()), [&](int64_t first, int64_t last) {
      std::vector<Stored> share(width);
      for (int64_t g = first; g < last; ++g) {
        const int64_t begin = nodes[g], end = nodes[g + 1];
        const Real divisor = mode == kMean ? static_cast<Real>(std::max<int64_t>(1, end - begin)) : Real(1);
        for (int64_t k = 0; k < width; ++k) {
          const Real grad = static_cast<Real>(incoming[g * width + k]) / divisor;
          share[k] = mode == kMax ? Stored(0) : static_cast<Stored>(grad);
        }
        for (int64_t row = begin; row < end; ++row) std::copy_n(share.data(), width, result + row * width);
        for (int64_t k = 0; mode == kMax && k < width; ++k) {
          const int64_t row = winners[g * width + k];
          if (row >= begin && row < end) result[row * width + k] = incoming[g * width + k];
        }
      }
    });
  });
  return grad_x;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(acgkd_fast, CPU, m) {
  m.impl("readout", TORCH_BOX(&readout));
  m.impl("readout_backward", TORCH_BOX(&readout_backward));
}

}  // namespace acgkd
