// Checks of operator arguments and the choice of a kernel by dtype.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <string>

#include "layout.h"

namespace acgkd {

using torch::headeronly::BFloat16;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kAny = -1;

inline std::string describe(const Tensor& tensor) {
  std::ostringstream text;
  text << (tensor.is_contiguous() ? "" : "non-contiguous ") << torch::headeronly::toString(tensor.scalar_type())
       << (tensor.is_cpu() ? " cpu" : "") << " tensor of shape (";
  for (int64_t d = 0; d < tensor.dim(); ++d) text << (d ? ", " : "") << tensor.size(d);
  text << ")";
  return text.str();
}

// Kernels read raw memory, so every argument is checked down to its extent; kAny matches any extent.
inline void check(const char* op, const char* name, const Tensor& tensor, ScalarType dtype,
                  std::initializer_list<int64_t> shape) {
  bool fits = tensor.is_cpu() && tensor.scalar_type() == dtype && tensor.is_contiguous() &&
              tensor.dim() == static_cast<int64_t>(shape.size());
  int64_t d = 0;
  for (int64_t extent : shape) {
    fits = fits && (extent == kAny || tensor.size(d) == extent);
    ++d;
  }
  if (fits) return;
  std::ostringstream wanted;
  d = 0;
  for (int64_t extent : shape) {
    wanted << (d++ ? ", " : "");
    extent == kAny ? wanted << "any" : wanted << extent;
  }
  STD_TORCH_CHECK(false, op, ": ", name, ": expected a contiguous ", torch::headeronly::toString(dtype),
                  " cpu tensor of shape (", wanted.str(), "), got a ", describe(tensor));
}

// Storage types, each with the type that arithmetic on it uses.
template <typename Stored>
struct Wide {
  using Type = float;
};
template <>
struct Wide<double> {
  using Type = double;
};
template <typename Stored>
using WideOf = typename Wide<Stored>::Type;

inline ScalarType wide_type(ScalarType stored) {
  return stored == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Calls `function` with a null pointer of the storage type, as C++17 lambdas take no type arguments.
template <typename Function>
auto by_dtype(const char* op, const Tensor& tensor, const Function& function) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return function(static_cast<float*>(nullptr));
    case ScalarType::Double:
      return function(static_cast<double*>(nullptr));
    default:
      STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::BFloat16, op,
                      ": expected float32, float64 or bfloat16, got a ", describe(tensor));
      return function(static_cast<BFloat16*>(nullptr));
  }
}

template <typename T>
const T* read(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <typename T>
T* write(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

inline Tensor new_tensor(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType dtype) {
  return torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(shape.begin(), shape.size()), dtype);
}

// A checked layout table; `kind` as in layout.h.
class Layouts {
 public:
  Layouts(const char* op, const Tensor& table, int64_t kind) : kind(kind) {
    check(op, "table", table, ScalarType::Long, {4, kAny});
    num_graphs = table.size(1) - 1;
    STD_TORCH_CHECK(num_graphs >= 0 && kind >= 0 && kind < 4, op, ": table: expected a pair layout of kind 0..3, got ",
                    describe(table), " of kind ", kind);
    table_ = read<int64_t>(table);
    bool valid = table_[0] == 0 && table_[num_graphs + 1] == 0;
    for (int64_t g = 0; g < num_graphs; ++g) {
      const GraphLayout graph = (*this)[g];
      valid = valid && graph.num_nodes >= 1 && graph.num_nodes < (int64_t(1) << 31) && graph.band >= 0 &&
              graph.num_pairs == count_pairs(graph.num_nodes, graph.band, kind);
    }
    STD_TORCH_CHECK(valid, op, ": table: expected the offsets of a PairLayout, got others");
    num_nodes = table_[num_graphs];
    num_pairs = table_[2 * num_graphs + 1];
  }

  GraphLayout operator[](int64_t graph) const { return graph_layout(table_, num_graphs, graph); }

  // Position of the graph that owns a node.
  int64_t graph_of_node(int64_t node) const {
    return std::upper_bound(table_, table_ + num_graphs + 1, node) - table_ - 1;
  }

  int64_t num_graphs, num_nodes, num_pairs, kind;

 private:
  const int64_t* table_;
};

}  // namespace acgkd
