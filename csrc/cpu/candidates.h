#pragma once

#include "cpu/tensors.h"

namespace acgkd {

// The operator of this name; see acgkd_fast/edges/reference.py.
Tensor candidate_gradient(const Tensor& left, const Tensor& right, const Tensor& node_term, const Tensor& table,
                          int64_t kind, int64_t num_pairs);

}  // namespace acgkd
