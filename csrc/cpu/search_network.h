// A frozen teacher of GCN or GIN blocks, its weights padded for the row kernels of the search.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>
#include <vector>

#include "cpu/tensors.h"

namespace acgkd {

// Channels come in tiles of one cache line; the padding holds zeros all the way through the network.
constexpr int64_t kTile = 16;

inline int64_t padded(int64_t width) { return (width + kTile - 1) / kTile * kTile; }

struct AlignedDelete {
  void operator()(float* data) const { ::operator delete[](data, std::align_val_t(64)); }
};
using AlignedFloats = std::unique_ptr<float[], AlignedDelete>;

inline AlignedFloats aligned_floats(int64_t count) {
  float* data = static_cast<float*>(::operator new[](count * sizeof(float), std::align_val_t(64)));
  std::fill_n(data, count, 0.0f);
  return AlignedFloats(data);
}

// y = x W + b; W has a row of `stride` floats per input channel.
struct Linear {
  int64_t inputs;
  AlignedFloats weight, bias;
};

// Frozen BatchNorm as one multiplication and one addition.
struct Norm {
  AlignedFloats scale, shift;
};

// GCN: Z = H W, A = normalised sum of Z + b, H' = relu(norm(A)) (+ H).
// GIN: Z = H W, A = (1 + eps) Z + sum of Z + b, Y = relu(inner(A)) W2 + b2, H' = relu(norm(Y)) (+ H).
// W stands before the sum over neighbours, which is the same up to rounding: fewer rows of Z change than of A.
struct Layer {
  float self = 1.0f;
  Linear transform, second;
  Norm inner, norm;
};

enum class Pooling : int64_t { kSum = 0, kMean = 1, kMax = 2 };

// Read from one flat tensor, in the order of acgkd_fast/search/packing.py.
struct Network {
  Network(const char* op, const Tensor& parameters, bool gin, int64_t depth, int64_t features, int64_t width,
          int64_t classes, int64_t pooling);

  int64_t norms() const { return depth() * (gin ? 2 : 1); }
  int64_t depth() const { return static_cast<int64_t>(layers.size()); }

  bool gin;
  int64_t features, width, stride, classes;
  Pooling pooling;
  std::vector<Layer> layers;
  // [classes, width] and [classes].
  std::vector<float> classifier, classifier_bias;
};

}  // namespace acgkd
