// Checks of operands, and what the forward and the backward kernels of message passing share.
#pragma once

#include "gather.h"

namespace acgkd_fast::cuda {

// The weight of a node's own row: 1 + eps for GIN (eps stays on the device), 0 or 1 for GCN.
struct SelfWeight {
  const void* eps = nullptr;  // null for GCN
  ScalarType eps_type = ScalarType::Float;
  bool self_loops = false;

  template <class W>
  __device__ __forceinline__ W read() const {
    if (eps == nullptr) {
      return self_loops ? W(1) : W(0);
    }
    switch (eps_type) {
      case ScalarType::Double:
        return W(1) + static_cast<W>(*static_cast<const double*>(eps));
      case ScalarType::BFloat16:
        return W(1) + static_cast<W>(*static_cast<const c10::BFloat16*>(eps));
      default:
        return W(1) + static_cast<W>(*static_cast<const float*>(eps));
    }
  }
};

inline SelfWeight gin_weight(const Tensor& eps, const Tensor& x) {
  const ScalarType type = eps.scalar_type();
  STD_TORCH_CHECK(eps.numel() == 1, "eps: expected one element, got ", eps.numel());
  STD_TORCH_CHECK(eps.get_device_index() == x.get_device_index(), "eps: expected the device of x");
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::BFloat16,
                  "eps: expected float32, float64 or bfloat16, got another dtype");
  return {eps.const_data_ptr(), type, false};
}

inline void check_matrix(const Tensor& x, const char* name = "x") {
  STD_TORCH_CHECK(x.dim() == 2, name, ": expected 2 dimensions, got ", x.dim());
  STD_TORCH_CHECK(x.size(1) <= INT32_MAX - 1024, name, ": expected fewer than 2^31 - 1024 features, got ", x.size(1));
}

inline void check_like(const Tensor& tensor, const Tensor& x, const char* name, const char* of = "x") {
  STD_TORCH_CHECK(tensor.dim() == 2 && tensor.size(0) == x.size(0) && tensor.size(1) == x.size(1) &&
                      tensor.scalar_type() == x.scalar_type() && tensor.get_device_index() == x.get_device_index(),
                  name, ": expected shape, dtype and device of ", of);
}

// The checks of the public functions in Python, once more for direct operator calls: wrong types and sizes are wild
// reads on the device.
inline void check_operands(const Tensor& x, const Tensor& value, const Tensor& rowptr, const Tensor& col,
                           const char* name = "x") {
  check_matrix(x, name);
  STD_TORCH_CHECK(value.scalar_type() == x.scalar_type(), "value: expected the dtype of ", name, ", got another");
  STD_TORCH_CHECK(rowptr.scalar_type() == ScalarType::Int && col.scalar_type() == ScalarType::Int,
                  "rowptr, col: expected int32, got another dtype");
  STD_TORCH_CHECK(rowptr.numel() == x.size(0) + 1, "rowptr: expected ", x.size(0) + 1, " elements, got ",
                  rowptr.numel());
  STD_TORCH_CHECK(value.numel() == col.numel(), "value: expected ", col.numel(), " elements, got ", value.numel());
  for (const Tensor* other : {&value, &rowptr, &col}) {
    STD_TORCH_CHECK(other->get_device_index() == x.get_device_index(), "expected all tensors on the device of ", name);
  }
}

// The transpose of a matrix, which only directed ones have.
struct Transpose {
  OptionalTensor rowptr, col, edge;

  void check(const Tensor& rowptr_of_matrix, int64_t capacity) {
    STD_TORCH_CHECK(rowptr.has_value() == col.has_value() && col.has_value() == edge.has_value(),
                    "t_rowptr, t_col, t_edge: expected all three or none");
    if (!rowptr) {
      return;
    }
    for (const OptionalTensor* part : {&rowptr, &col, &edge}) {
      STD_TORCH_CHECK((*part)->scalar_type() == ScalarType::Int, "t_rowptr, t_col, t_edge: expected int32");
      STD_TORCH_CHECK((*part)->get_device_index() == rowptr_of_matrix.get_device_index(),
                      "t_rowptr, t_col, t_edge: expected the device of rowptr");
    }
    STD_TORCH_CHECK(rowptr->numel() == rowptr_of_matrix.numel(), "t_rowptr: expected ", rowptr_of_matrix.numel(),
                    " elements, got ", rowptr->numel());
    STD_TORCH_CHECK(col->numel() == edge->numel() && col->numel() <= capacity,
                    "t_col, t_edge: expected at most one entry per entry of the matrix");
    rowptr = dense(rowptr), col = dense(col), edge = dense(edge);
  }
};

template <class T>
constexpr ScalarType kWideType = std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float;

// What forward kept for backward: `count` numbers of accumulation type on the device of x.
template <class T>
void check_kept(const Tensor& kept, const Tensor& x, int64_t count, const char* name) {
  STD_TORCH_CHECK(kept.scalar_type() == kWideType<T> && kept.numel() == count &&
                      kept.get_device_index() == x.get_device_index(),
                  name, ": expected ", count, " accumulation values on the device of the features");
}

// Calls body(std::bool_constant<first>, std::bool_constant<second>).
template <class Body>
void with_flags(bool first, bool second, Body body) {
  if (first) {
    second ? body(std::true_type{}, std::true_type{}) : body(std::true_type{}, std::false_type{});
  } else {
    second ? body(std::false_type{}, std::true_type{}) : body(std::false_type{}, std::false_type{});
  }
}

}  // namespace acgkd_fast::cuda
