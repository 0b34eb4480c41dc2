// What the forward and the backward kernels of the frozen BatchNorm share.
#pragma once

#include "propagate.h"

namespace acgkd_fast::cuda {

// out = (x - mean) factor + bias with factor = weight / sqrt(variance + eps), all [width].
template <class T>
struct Statistics {
  const T* mean;
  const T* variance;
  const T* weight;
  const T* bias;
  Wide<T> eps;
};

// One thread's columns of the statistics.
template <class T, bool kVector>
struct Columns {
  Share<T, kVector> mean, factor, bias;

  __device__ __forceinline__ Columns(const Statistics<T>& norm, const Lane<T, kVector>& at, int feature) {
    Share<T, kVector> variance, weight;
    at.load(norm.mean, feature, mean);
    at.load(norm.bias, feature, bias);
    at.load(norm.variance, feature, variance);
    at.load(norm.weight, feature, weight);
#pragma unroll
    for (int c = 0; c < kElements<T, kVector>; ++c) {
      factor[c] = weight[c] / sqrt(variance[c] + norm.eps);
    }
  }

  __device__ __forceinline__ Wide<T> normalised(Wide<T> x, int c) const { return (x - mean[c]) * factor[c] + bias[c]; }
};

inline void check_column(const Tensor& column, const Tensor& x, ScalarType dtype, const char* name) {
  STD_TORCH_CHECK(column.numel() == x.size(1) && column.scalar_type() == dtype &&
                      column.get_device_index() == x.get_device_index(),
                  name, ": expected one value per column, on the device and of the precision of x");
}

// The four constants of BatchNorm, kept alive while their addresses are in use.
struct Constants {
  Tensor mean, variance, weight, bias;

  Constants(const Tensor& x, const Tensor& mean, const Tensor& variance, const Tensor& weight, const Tensor& bias)
      : mean(dense(mean)), variance(dense(variance)), weight(dense(weight)), bias(dense(bias)) {
    check_column(mean, x, x.scalar_type(), "mean");
    check_column(variance, x, x.scalar_type(), "variance");
    check_column(weight, x, x.scalar_type(), "weight");
    check_column(bias, x, x.scalar_type(), "bias");
  }

  template <class T>
  Statistics<T> statistics(double eps) const {
    return {read<T>(mean), read<T>(variance), read<T>(weight), read<T>(bias), static_cast<Wide<T>>(eps)};
  }
};

}  // namespace acgkd_fast::cuda
