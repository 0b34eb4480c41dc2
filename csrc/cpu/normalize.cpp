// Column statistics, and the frozen BatchNorm fused with rectifier and residual sum.
#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/simd.h"
#include "cpu/tensors.h"

namespace acgkd {
namespace {

// Rows whose statistics are taken in two passes while they are in the cache. Part of the result: not to be tuned
// by thread count.
constexpr int64_t kBlockRows = 128;

int64_t rows_per_task(int64_t width) { return std::max<int64_t>(1, (int64_t(1) << 15) / std::max<int64_t>(1, width)); }

// Sum and sum of squared deviations from the block's own mean.
template <typename Stored, typename Real>
ACGKD_SHARED void block_moments(const Stored* x, int64_t rows, int64_t width, Real* mean, Real* spread) {
  std::fill_n(mean, width, Real(0));
  std::fill_n(spread, width, Real(0));
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t k = 0; k < width; ++k) mean[k] += static_cast<Real>(x[row * width + k]);
  }
  for (int64_t k = 0; k < width; ++k) mean[k] /= static_cast<Real>(rows);
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t k = 0; k < width; ++k) {
      const Real d = static_cast<Real>(x[row * width + k]) - mean[k];
      spread[k] += d * d;
    }
  }
}

template <typename Stored, typename Real>
ACGKD_SHARED void moments_gradient(const Stored* x, int64_t elements, int64_t width, const Real* mean,
                                   const Real* offset, const Real* slope, Stored* grad_x) {
  for (int64_t at = 0; at < elements; at += width) {
    for (int64_t k = 0; k < width; ++k) {
      // The difference first: a large mean would swallow it.
      grad_x[at + k] = static_cast<Stored>(offset[k] + slope[k] * (static_cast<Real>(x[at + k]) - mean[k]));
    }
  }
}

template <typename Stored, typename Real>
ACGKD_SHARED void norm_relu(const Stored* x, const Stored* residual, int64_t elements, int64_t width,
                            const Real* scale, const Real* shift, Stored* out) {
  for (int64_t at = 0; at < elements; at += width) {
    for (int64_t k = 0; k < width; ++k) {
      const Real value = static_cast<Real>(x[at + k]) * scale[k] + shift[k];
      // In this order a NaN stays one.
      const Real rectified = value < Real(0) ? Real(0) : value;
      out[at + k] = static_cast<Stored>(residual ? rectified + static_cast<Real>(residual[at + k]) : rectified);
    }
  }
}

// `offset` and `slope` carry the gradient of the moments.
template <typename Stored, typename Real>
ACGKD_SHARED void norm_relu_gradient(const Stored* grad_out, const Stored* x, int64_t elements, int64_t width,
                                     const Real* scale, const Real* shift, const Real* mean, const Real* offset,
                                     const Real* slope, Stored* grad_x) {
  for (int64_t at = 0; at < elements; at += width) {
    for (int64_t k = 0; k < width; ++k) {
      const Real in = static_cast<Real>(x[at + k]);
      const Real value = in * scale[k] + shift[k];
      const Real grad = static_cast<Real>(grad_out[at + k]) * scale[k];
      const Real passed = value <= Real(0) ? Real(0) : grad;
      grad_x[at + k] = static_cast<Stored>(passed + offset[k] + slope[k] * (in - mean[k]));
    }
  }
}

// target_clones does not reach templates, hence one overload per type.
#define ACGKD_FOR_TYPE(Stored)                                                                                        \
  ACGKD_CLONES static void run_block(const Stored* x, int64_t rows, int64_t width, WideOf<Stored>* mean,              \
                                     WideOf<Stored>* spread) {                                                        \
    block_moments(x, rows, width, mean, spread);                                                                      \
  }                                                                                                                   \
  ACGKD_CLONES static void run_moments_gradient(const Stored* x, int64_t elements, int64_t width,                     \
                                                const WideOf<Stored>* mean, const WideOf<Stored>* offset,             \
                                                const WideOf<Stored>* slope, Stored* grad_x) {                        \
    moments_gradient(x, elements, width, mean, offset, slope, grad_x);                                                \
  }                                                                                                                   \
  ACGKD_CLONES static void run_norm(const Stored* x, const Stored* residual, int64_t elements, int64_t width,         \
                                    const WideOf<Stored>* scale, const WideOf<Stored>* shift, Stored* out) {          \
    residual ? norm_relu(x, residual, elements, width, scale, shift, out)                                             \
             : norm_relu(x, static_cast<const Stored*>(nullptr), elements, width, scale, shift, out);                 \
  }                                                                                                                   \
  ACGKD_CLONES static void run_norm_gradient(const Stored* grad_out, const Stored* x, int64_t elements, int64_t width, \
                                             const WideOf<Stored>* scale, const WideOf<Stored>* shift,                \
                                             const WideOf<Stored>* mean, const WideOf<Stored>* offset,                \
                                             const WideOf<Stored>* slope, Stored* grad_x) {                           \
    norm_relu_gradient(grad_out, x, elements, width, scale, shift, mean, offset, slope, grad_x);                      \
  }
ACGKD_FOR_TYPE(float)
ACGKD_FOR_TYPE(double)
ACGKD_FOR_TYPE(BFloat16)
#undef ACGKD_FOR_TYPE

template <typename Stored>
void take_moments(const Stored* x, int64_t rows, int64_t width, WideOf<Stored>* mean, WideOf<Stored>* variance) {
  using Real = WideOf<Stored>;
  const int64_t blocks = (rows + kBlockRows - 1) / kBlockRows;
  std::vector<Real> means(blocks * width), spreads(blocks * width);
  torch::stable::parallel_for(0, blocks, std::max<int64_t>(1, rows_per_task(width) / kBlockRows),
                              [&](int64_t begin, int64_t end) {
                                for (int64_t b = begin; b < end; ++b) {
                                  const int64_t first = b * kBlockRows;
                                  run_block(x + first * width, std::min(kBlockRows, rows - first), width,
                                            means.data() + b * width, spreads.data() + b * width);
                                }
                              });
  // Blocks are merged in order and in double (Chan, Golub, LeVeque 1979).
  for (int64_t k = 0; k < width; ++k) {
    double count = 0, centre = 0, spread = 0;
    for (int64_t b = 0; b < blocks; ++b) {
      const double more = static_cast<double>(std::min(kBlockRows, rows - b * kBlockRows));
      const double distance = static_cast<double>(means[b * width + k]) - centre;
      const double total = count + more;
      centre += distance * more / total;
      spread += static_cast<double>(spreads[b * width + k]) + distance * distance * count * more / total;
      count = total;
    }
    mean[k] = static_cast<Real>(centre);
    variance[k] = static_cast<Real>(rows ? spread / count : 0);
  }
}

// Gradient of the moments as offset + slope (x - mean); zeros where no gradient is given.
template <typename Real>
struct MomentsGradient {
  MomentsGradient(const char* op, int64_t rows, int64_t width, ScalarType wide, const Tensor* grad_mean,
                  const Tensor* grad_variance, const Tensor* batch_mean)
      : mean(width), offset(width), slope(width) {
    if (!grad_mean) return;
    check(op, "grad_mean", *grad_mean, wide, {width});
    check(op, "grad_variance", *grad_variance, wide, {width});
    check(op, "mean", *batch_mean, wide, {width});
    const Real count = static_cast<Real>(std::max<int64_t>(1, rows));
    for (int64_t k = 0; k < width; ++k) {
      mean[k] = read<Real>(*batch_mean)[k];
      offset[k] = read<Real>(*grad_mean)[k] / count;
      slope[k] = Real(2) * read<Real>(*grad_variance)[k] / count;
    }
  }
  std::vector<Real> mean, offset, slope;
};

std::tuple<Tensor, Tensor> column_moments(const Tensor& x) {
  const char* op = "column_moments";
  check(op, "x", x, x.scalar_type(), {kAny, kAny});
  const int64_t rows = x.size(0), width = x.size(1);
  const ScalarType wide = wide_type(x.scalar_type());
  const Tensor mean = new_tensor(x, {width}, wide), variance = new_tensor(x, {width}, wide);
  by_dtype(op, x, [&](auto* type) {
    using Stored = std::remove_pointer_t<decltype(type)>;
    using Real = WideOf<Stored>;
    take_moments(read<Stored>(x), rows, width, write<Real>(mean), write<Real>(variance));
  });
  return {mean, variance};
}

Tensor column_moments_backward(const Tensor& grad_mean, const Tensor& grad_variance, const Tensor& x,
                               const Tensor& mean) {
  const char* op = "column_moments_backward";
  check(op, "x", x, x.scalar_type(), {kAny, kAny});
  const int64_t rows = x.size(0), width = x.size(1);
  const Tensor grad_x = new_tensor(x, {rows, width}, x.scalar_type());
  by_dtype(op, x, [&](auto* type) {
    using Stored = std::remove_pointer_t<decltype(type)>;
    using Real = WideOf<Stored>;
    const MomentsGradient<Real> moments(op, rows, width, wide_type(x.scalar_type()), &grad_mean, &grad_variance, &mean);
    torch::stable::parallel_for(0, rows, rows_per_task(width), [&](int64_t begin, int64_t end) {
      run_moments_gradient(read<Stored>(x) + begin * width, (end - begin) * width, width, moments.mean.data(),
                           moments.offset.data(), moments.slope.data(), write<Stored>(grad_x) + begin * width);
    });
  });
  return grad_x;
}

// BatchNorm as one multiplication and one addition per channel.
template <typename Stored>
struct Affine {
  using Real = WideOf<Stored>;
  Affine(const char* op, int64_t width, ScalarType dtype, const Tensor& mean, const Tensor& variance,
         const Tensor& weight, const Tensor& bias, double eps)
      : scale(width), shift(width) {
    check(op, "mean", mean, dtype, {width});
    check(op, "variance", variance, dtype, {width});
    check(op, "weight", weight, dtype, {width});
    check(op, "bias", bias, dtype, {width});
    for (int64_t k = 0; k < width; ++k) {
      const double factor = static_cast<double>(static_cast<Real>(read<Stored>(weight)[k])) /
                            std::sqrt(static_cast<double>(static_cast<Real>(read<Stored>(variance)[k])) + eps);
      scale[k] = static_cast<Real>(factor);
      shift[k] = static_cast<Real>(static_cast<double>(static_cast<Real>(read<Stored>(bias)[k])) -
                                   static_cast<double>(static_cast<Real>(read<Stored>(mean)[k])) * factor);
    }
  }
  std::vector<Real> scale, shift;
};

std::tuple<Tensor, Tensor, Tensor> frozen_norm_relu(const Tensor& x, const std::optional<Tensor>& residual,
                                                    const Tensor& mean, const Tensor& variance, const Tensor& weight,
                                                    const Tensor& bias, double eps, bool moments) {
  const char* op = "frozen_norm_relu";
  check(op, "x", x, x.scalar_type(), {kAny, kAny});
  const int64_t rows = x.size(0), width = x.size(1);
  if (residual.has_value()) check(op, "residual", *residual, x.scalar_type(), {rows, width});
  const ScalarType wide = wide_type(x.scalar_type());
  const Tensor out = new_tensor(x, {rows, width}, x.scalar_type());
  const Tensor batch_mean = new_tensor(x, {moments ? width : 0}, wide);
  const Tensor batch_variance = new_tensor(x, {moments ? width : 0}, wide);
  by_dtype(op, x, [&](auto* type) {
    using Stored = std::remove_pointer_t<decltype(type)>;
    using Real = WideOf<Stored>;
    const Affine<Stored> affine(op, width, x.scalar_type(), mean, variance, weight, bias, eps);
    const Stored* added = residual.has_value() ? read<Stored>(*residual) : nullptr;
    torch::stable::parallel_for(0, rows, rows_per_task(width), [&](int64_t begin, int64_t end) {
      const int64_t first = begin * width;
      run_norm(read<Stored>(x) + first, added ? added + first : nullptr, end * width - first, width,
               affine.scale.data(), affine.shift.data(), write<Stored>(out) + first);
    });
    if (moments) take_moments(read<Stored>(x), rows, width, write<Real>(batch_mean), write<Real>(batch_variance));
  });
  return {out, batch_mean, batch_variance};
}

Tensor frozen_norm_relu_backward(const Tensor& grad_out, const std::optional<Tensor>& grad_mean,
                                 const std::optional<Tensor>& grad_variance, const Tensor& x, const Tensor& batch_mean,
                                 const Tensor& mean, const Tensor& variance, const Tensor& weight, const Tensor& bias,
                                 double eps) {
  const char* op = "frozen_norm_relu_backward";
  check(op, "x", x, x.scalar_type(), {kAny, kAny});
  const int64_t rows = x.size(0), width = x.size(1);
  check(op, "grad_out", grad_out, x.scalar_type(), {rows, width});
  STD_TORCH_CHECK(grad_mean.has_value() == grad_variance.has_value(), op,
                  ": grad_mean, grad_variance: expected both or none of them, got one");
  const Tensor grad_x = new_tensor(x, {rows, width}, x.scalar_type());
  by_dtype(op, x, [&](auto* type) {
    using Stored = std::remove_pointer_t<decltype(type)>;
    const Affine<Stored> affine(op, width, x.scalar_type(), mean, variance, weight, bias, eps);
    const MomentsGradient<WideOf<Stored>> moments(op, rows, width, wide_type(x.scalar_type()),
                                                  grad_mean.has_value() ? &*grad_mean : nullptr,
                                                  grad_mean.has_value() ? &*grad_variance : nullptr, &batch_mean);
    torch::stable::parallel_for(0, rows, rows_per_task(width), [&](int64_t begin, int64_t end) {
      const int64_t first = begin * width;
      run_norm_gradient(read<Stored>(grad_out) + first, read<Stored>(x) + first, end * width - first, width,
                        affine.scale.data(), affine.shift.data(), moments.mean.data(), moments.offset.data(),
                        moments.slope.data(), write<Stored>(grad_x) + first);
    });
  });
  return grad_x;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(acgkd_fast, CPU, m) {
  m.impl("column_moments", TORCH_BOX(&column_moments));
  m.impl("column_moments_backward", TORCH_BOX(&column_moments_backward));
  m.impl("frozen_norm_relu", TORCH_BOX(&frozen_norm_relu));
  m.impl("frozen_norm_relu_backward", TORCH_BOX(&frozen_norm_relu_backward));
}

}  // namespace acgkd
