#include "cpu/search_network.h"

namespace acgkd {
namespace {

class Reader {
 public:
  explicit Reader(const float* from) : from_(from) {}

  AlignedFloats row(int64_t width, int64_t rows = 1) {
    const int64_t stride = padded(width);
    AlignedFloats to = aligned_floats(rows * stride);
    for (int64_t r = 0; r < rows; ++r, from_ += width) std::copy_n(from_, width, to.get() + r * stride);
    return to;
  }

  Linear linear(int64_t inputs, int64_t outputs) {
    AlignedFloats weight = row(outputs, inputs);
    return {inputs, std::move(weight), row(outputs)};
  }

  Norm norm(int64_t width) {
    AlignedFloats scale = row(width);
    return {std::move(scale), row(width)};
  }

  float number() { return *from_++; }

  std::vector<float> plain(int64_t count) {
    std::vector<float> to(from_, from_ + count);
    from_ += count;
    return to;
  }

 private:
  const float* from_;
};

}  // namespace

Network::Network(const char* op, const Tensor& parameters, bool gin, int64_t depth, int64_t features, int64_t width,
                 int64_t classes, int64_t pooling)
    : gin(gin), features(features), width(width), stride(padded(width)), classes(classes) {
  STD_TORCH_CHECK(depth >= 1 && features >= 1 && width >= 1 && classes >= 1 && pooling >= 0 && pooling <= 2, op,
                  ": expected depth, features, width and classes of 1 or more and a readout 0..2, got ", depth, ", ",
                  features, ", ", width, ", ", classes, " and ", pooling);
  this->pooling = static_cast<Pooling>(pooling);
  const int64_t affine = 2 * width, square = width * width + width;
  const int64_t block = gin ? 1 + 2 * affine + square : affine;
  const int64_t inputs = features + (depth - 1) * width;
  check(op, "parameters", parameters, ScalarType::Float,
        {inputs * width + depth * (width + block) + classes * (width + 1)});
  Reader reader(read<float>(parameters));
  layers.resize(depth);
  for (int64_t l = 0; l < depth; ++l) {
    Layer& layer = layers[l];
    layer.transform = reader.linear(l ? width : features, width);
    if (gin) {
      layer.self = reader.number();
      layer.inner = reader.norm(width);
      layer.second = reader.linear(width, width);
    }
    layer.norm = reader.norm(width);
  }
  classifier = reader.plain(classes * width);
  classifier_bias = reader.plain(classes);
}

}  // namespace acgkd
