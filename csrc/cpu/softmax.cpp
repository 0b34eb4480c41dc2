// softmax_rows and mean_entropy of soft one-hot features: many short rows, on which general kernels spend most of
// their time at the ends of rows.
#include <algorithm>
#include <limits>
#include <vector>

#include "cpu/tensors.h"
#include "cpu/vector.h"

namespace acgkd {
namespace {

// Values of the rows that are worked on together; the order of sums depends on it, so it is not to be tuned by thread.
constexpr int64_t kChunk = 2048;

int64_t chunk_rows(int64_t width) { return std::max<int64_t>(1, kChunk / std::max<int64_t>(1, width)); }

template <typename Stored, typename Real>
ACGKD_SHARED void softmax(const Stored* x, int64_t rows, int64_t width, Real* shifted, Stored* out) {
  for (int64_t r = 0; r < rows; ++r) {
    Real top = static_cast<Real>(x[r * width]);
    for (int64_t k = 1; k < width; ++k) top = std::max(top, static_cast<Real>(x[r * width + k]));
    for (int64_t k = 0; k < width; ++k) shifted[r * width + k] = static_cast<Real>(x[r * width + k]) - top;
  }
  // One loop over all rows, as a short row fills no vector.
  for (int64_t i = 0; i < rows * width; ++i) shifted[i] = exponential(shifted[i]);
  for (int64_t r = 0; r < rows; ++r) {
    Real total = 0;
    for (int64_t k = 0; k < width; ++k) total += shifted[r * width + k];
    const Real factor = Real(1) / total;
    for (int64_t k = 0; k < width; ++k) out[r * width + k] = static_cast<Stored>(shifted[r * width + k] * factor);
  }
}

template <typename Stored, typename Real>
ACGKD_SHARED void softmax_gradient(const Stored* grad_out, const Stored* out, int64_t rows, int64_t width, Real*,
                                   Stored* grad_x) {
  for (int64_t r = 0; r < rows; ++r) {
    Real dot = 0;
    for (int64_t k = 0; k < width; ++k) {
      dot += static_cast<Real>(grad_out[r * width + k]) * static_cast<Real>(out[r * width + k]);
    }
    for (int64_t k = 0; k < width; ++k) {
      const Real y = static_cast<Real>(out[r * width + k]);
      grad_x[r * width + k] = static_cast<Stored>(y * (static_cast<Real>(grad_out[r * width + k]) - dot));
    }
  }
}

// log of the smallest normal number at 0 and below it, so that 0 times it is 0.
template <typename Real>
ACGKD_SHARED Real bounded_log(Real x) {
  constexpr Real tiny = std::numeric_limits<Real>::min();
  return logarithm(x < tiny ? tiny : x);
}

template <typename Stored, typename Real>
ACGKD_SHARED void entropy(const Stored* x, int64_t count, Real* terms) {
  for (int64_t i = 0; i < count; ++i) {
    const Real value = static_cast<Real>(x[i]);
    const Real term = -value * bounded_log(value);
    terms[i] = value < Real(0) ? -std::numeric_limits<Real>::infinity() : term;
  }
}

template <typename Stored, typename Real>
ACGKD_SHARED void entropy_gradient(const Stored* x, int64_t count, Real factor, Stored* grad_x) {
  for (int64_t i = 0; i < count; ++i) {
    grad_x[i] = static_cast<Stored>(-factor * (bounded_log(static_cast<Real>(x[i])) + Real(1)));
  }
}

// target_clones does not reach templates, hence one overload per type.
#define ACGKD_FOR_TYPE(Stored)                                                                                    \
  ACGKD_CLONES void run_softmax(const Stored* x, int64_t rows, int64_t width, WideOf<Stored>* shifted, Stored* out) { \
    softmax(x, rows, width, shifted, out);                                                                        \
  }                                                                                                               \
  ACGKD_CLONES void run_softmax_gradient(const Stored* grad_out, const Stored* out, int64_t rows, int64_t width,  \
                                         WideOf<Stored>* scratch, Stored* grad_x) {                               \
    softmax_gradient(grad_out, out, rows, width, scratch, grad_x);                                                \
  }                                                                                                               \
  ACGKD_CLONES void run_entropy(const Stored* x, int64_t count, WideOf<Stored>* terms) { entropy(x, count, terms); } \
  ACGKD_CLONES void run_entropy_gradient(const Stored* x, int64_t count, WideOf<Stored> factor, Stored* grad_x) { \
    entropy_gradient(x, count, factor, grad_x);                                                                   \
  }
ACGKD_FOR_TYPE(float)
ACGKD_FOR_TYPE(double)
ACGKD_FOR_TYPE(BFloat16)
#undef ACGKD_FOR_TYPE

// Calls function(first row, rows, scratch of one chunk) for all rows, in parallel.
template <typename Real, typename Function>
void for_row_chunks(int64_t rows, int64_t width, const Function& function) {
  const int64_t step = chunk_rows(width), chunks = (rows + step - 1) / step;
  torch::stable::parallel_for(0, chunks, 16, [&](int64_t begin, int64_t end) {
    std::vector<Real> scratch(step * width);
    for (int64_t c = begin; c < end; ++c) function(c * step, std::min(step, rows - c * step), scratch.data());
  });
}

Tensor softmax_rows(const Tensor& x) {
  const char* op = "softmax_rows";
  check(op, "x", x, x.scalar_type(), {kAny, kAny});
  const int64_t rows = x.size(0), width = x.size(1);
  const Tensor out = new_tensor(x, {rows, width}, x.scalar_type());
  if (width == 0) return out;
  by_dtype(op, x, [&](auto* type) {
    using Stored = std::remove_pointer_t<decltype(type)>;
    for_row_chunks<WideOf<Stored>>(rows, width, [&](int64_t first, int64_t count, WideOf<Stored>* scratch) {
      run_softmax(read<Stored>(x) + first * width, count, width, scratch, write<Stored>(out) + first * width);
    });
  });
  return out;
}

Tensor softmax_rows_backward(const Tensor& grad_out, const Tensor& out) {
  const char* op = "softmax_rows_backward";
  check(op, "out", out, out.scalar_type(), {kAny, kAny});
  const int64_t rows = out.size(0), width = out.size(1);
  check(op, "grad_out", grad_out, out.scalar_type(), {rows, width});
  const Tensor grad_x = new_tensor(out, {rows, width}, out.scalar_type());
  by_dtype(op, out, [&](auto* type) {
    using Stored = std::remove_pointer_t<decltype(type)>;
    for_row_chunks<WideOf<Stored>>(rows, width, [&](int64_t first, int64_t count, WideOf<Stored>* scratch) {
      run_softmax_gradient(read<Stored>(grad_out) + first * width, read<Stored>(out) + first * width, count, width,
                           scratch, write<Stored>(grad_x) + first * width);
    });
  });
  return grad_x;
}

Tensor mean_entropy(const Tensor& x) {
  const char* op = "mean_entropy";
  check(op, "x", x, x.scalar_type(), {kAny, kAny});
  const int64_t rows = x.size(0), width = x.size(1);
  const Tensor mean = new_tensor(x, {}, wide_type(x.scalar_type()));
  by_dtype(op, x, [&](auto* type) {
    using Stored = std::remove_pointer_t<decltype(type)>;
    using Real = WideOf<Stored>;
    const int64_t step = chunk_rows(width);
    std::vector<double> sums((rows + step - 1) / step);
    for_row_chunks<Real>(rows, width, [&](int64_t first, int64_t count, Real* terms) {
      run_entropy(read<Stored>(x) + first * width, count * width, terms);
      double total = 0;
      for (int64_t i = 0; i < count * width; ++i) total += terms[i];
      sums[first / step] = total;
    });
    double total = 0;
    for (const double sum : sums) total += sum;
    *write<Real>(mean) = static_cast<Real>(total / static_cast<double>(rows));
  });
  return mean;
}

Tensor mean_entropy_backward(const Tensor& grad_mean, const Tensor& x) {
  const char* op = "mean_entropy_backward";
  check(op, "x", x, x.scalar_type(), {kAny, kAny});
  check(op, "grad_mean", grad_mean, wide_type(x.scalar_type()), {});
  const int64_t rows = x.size(0), width = x.size(1);
  const Tensor grad_x = new_tensor(x, {rows, width}, x.scalar_type());
  by_dtype(op, x, [&](auto* type) {
    using Stored = std::remove_pointer_t<decltype(type)>;
    using Real = WideOf<Stored>;
    const Real factor = *read<Real>(grad_mean) / static_cast<Real>(std::max<int64_t>(1, rows));
    torch::stable::parallel_for(0, rows * width, 1 << 14, [&](int64_t begin, int64_t end) {
      run_entropy_gradient(read<Stored>(x) + begin, end - begin, factor, write<Stored>(grad_x) + begin);
    });
  });
  return grad_x;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(acgkd_fast, CPU, m) {
  m.impl("softmax_rows", TORCH_BOX(&softmax_rows));
  m.impl("softmax_rows_backward", TORCH_BOX(&softmax_rows_backward));
  m.impl("mean_entropy", TORCH_BOX(&mean_entropy));
  m.impl("mean_entropy_backward", TORCH_BOX(&mean_entropy_backward));
}

}  // namespace acgkd
