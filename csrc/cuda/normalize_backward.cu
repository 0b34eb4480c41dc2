// Gradients of the column moments and of the frozen BatchNorm with its rectifier, alone or added up in one pass.

#include "normalize.h"

namespace acgkd_fast::cuda {
namespace {

template <class T>
struct Backward {
  Plan plan;
  int64_t rows;
  const T* x;
  Statistics<T> norm;
  const T* grad_out;         // null: no norm
  const Wide<T>* grad_mean;  // null: no moments, and neither of the next two
  const Wide<T>* grad_variance;
  const Wide<T>* batch_mean;
  T* grad_x;
};

// grad_x = grad_out factor where the rectifier passes + (grad_mean + 2 (x - batch_mean) grad_variance) / rows.
template <class T, bool kVector>
__global__ void __launch_bounds__(kThreads, 2) backward_kernel(Backward<T> a) {
  using W = Wide<T>;
  constexpr int K = kElements<T, kVector>;
  const Lane<T, kVector> at(a.plan);
  const int64_t stride = static_cast<int64_t>(gridDim.x) * at.groups;
  const W share = W(1) / static_cast<W>(a.rows);
  for (int tile = 0; tile < a.plan.tiles; ++tile) {
    const int feature = at.first_feature(tile);
    const Columns<T, kVector> columns(a.norm, at, a.grad_out != nullptr ? feature : a.plan.width);
    Share<T, kVector> centre{}, slope{}, constant{};
    if (a.grad_mean != nullptr) {
#pragma unroll
      for (int c = 0; c < K; ++c) {
        const int column = feature + (kVector ? c : c * at.lanes);
        if (column < a.plan.width) {
          centre[c] = a.batch_mean[column];
          slope[c] = W(2) * a.grad_variance[column] * share;
          constant[c] = a.grad_mean[column] * share;
        }
      }
    }
#pragma unroll 2
    for (int64_t row = static_cast<int64_t>(blockIdx.x) * at.groups + at.group; row < a.rows; row += stride) {
      const int64_t offset = row * a.plan.width;
      Share<T, kVector> here, upstream;
      at.load(a.x + offset, feature, here);
      if (a.grad_out != nullptr) {
        at.load(a.grad_out + offset, feature, upstream);
      }
#pragma unroll
      for (int c = 0; c < K; ++c) {
        W grad = 0;
        if (a.grad_out != nullptr) {
          grad = columns.normalised(here[c], c) <= W(0) ? W(0) : upstream[c] * columns.factor[c];
        }
        if (a.grad_mean != nullptr) {
          grad += constant[c] + (here[c] - centre[c]) * slope[c];
        }
        here[c] = grad;
      }
      at.store(a.grad_x + offset, feature, here);
    }
  }
}

template <class T>
Tensor run_backward(cudaStream_t stream, const Tensor& x, Backward<T> a) {
  const Tensor grad_x = empty(x, {x.size(0), x.size(1)}, x.scalar_type());
  a.rows = x.size(0);
  a.x = read<T>(x);
  a.grad_x = write<T>(grad_x);
  if (grad_x.numel() == 0) {
    return grad_x;
  }
  const int processors = multiprocessors();
  const bool aligned =
      aligned16({a.x, a.grad_out, a.grad_x, a.norm.mean, a.norm.variance, a.norm.weight, a.norm.bias});
  a.plan = make_plan<T>(a.rows, 0, x.size(1), aligned, processors, false, false);
  // Few enough blocks that the statistics of a column are loaded for several rows.
  const int64_t blocks =
      std::min<int64_t>(ceil_div(a.rows, kThreads >> a.plan.lanes_log2), int64_t{4} * processors);
  launch(stream, a.plan.vector ? backward_kernel<T, true> : backward_kernel<T, false>, blocks, kThreads, 0, a);
  return grad_x;
}

// Reads the gradients of the moments; `held` keeps dense copies alive.
template <class T>
void set_moment_gradients(Backward<T>& a, const Tensor& x, Tensor (&held)[3]) {
  const char* names[] = {"grad_mean", "grad_variance", "batch_mean"};
  const Wide<T>** fields[] = {&a.grad_mean, &a.grad_variance, &a.batch_mean};
  for (int i = 0; i < 3; ++i) {
    check_column(held[i], x, kWideType<T>, names[i]);
    held[i] = dense(held[i]);
    *fields[i] = read<Wide<T>>(held[i]);
  }
}

Tensor column_moments_backward(Tensor grad_mean, Tensor grad_variance, Tensor x, Tensor mean) {
  check_matrix(x);
  const DeviceScope device(x);
  x = dense(x);
  return dispatch_storage(x, [&](auto tag) {
    using T = typename decltype(tag)::type;
    Tensor held[] = {grad_mean, grad_variance, mean};
    Backward<T> a{};
    set_moment_gradients(a, x, held);
    return run_backward(device.stream, x, a);
  });
}

Tensor frozen_norm_relu_backward(Tensor grad_out, OptionalTensor grad_mean, OptionalTensor grad_variance, Tensor x,
                                 Tensor batch_mean, Tensor mean, Tensor variance, Tensor weight, Tensor bias,
                                 double eps) {
  check_matrix(x);
  check_like(grad_out, x, "grad_out");
  STD_TORCH_CHECK(grad_mean.has_value() == grad_variance.has_value(),
                  "grad_mean, grad_variance: expected both or none");
  const DeviceScope device(x);
  x = dense(x), grad_out = dense(grad_out);
  const Constants constants(x, mean, variance, weight, bias);
  return dispatch_storage(x, [&](auto tag) {
    using T = typename decltype(tag)::type;
    Backward<T> a{};
    a.norm = constants.statistics<T>(eps);
    a.grad_out = read<T>(grad_out);
    if (!grad_mean) {
      return run_backward(device.stream, x, a);
    }
    Tensor held[] = {*grad_mean, *grad_variance, batch_mean};
    set_moment_gradients(a, x, held);
    return run_backward(device.stream, x, a);
  });
}

}  // namespace
}  // namespace acgkd_fast::cuda

STABLE_TORCH_LIBRARY_IMPL(ACGKD_FAST_NAMESPACE, ACGKD_FAST_DISPATCH_KEY, m) {
  m.impl("column_moments_backward", TORCH_BOX(&acgkd_fast::cuda::column_moments_backward));
  m.impl("frozen_norm_relu_backward", TORCH_BOX(&acgkd_fast::cuda::frozen_norm_relu_backward));
}
