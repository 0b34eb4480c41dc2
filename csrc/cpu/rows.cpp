#include "cpu/rows.h"

#include <algorithm>
#include <vector>

namespace acgkd {
namespace {

template <bool kGcn, typename Stored>
ACGKD_SHARED void forward(const Forward<Stored>& task, int64_t begin, int64_t end) {
  using Real = WideOf<Stored>;
  const bool alone = kGcn && task.self == 0;
  for (int64_t row = begin; row < end; ++row) {
    const Real scale = kGcn ? task.scale[row] : Real(1);
    const Real self = kGcn ? task.self * scale : task.self;
    for_runs<Real>(task.x.width(), [&](auto run, int64_t first) __attribute__((always_inline)) {
      constexpr int kCount = decltype(run)::kCount;
      Vec<Real> total[kCount], x[kCount];
      task.x.read(run, row, first, x);
      // Not 0 * x, which is NaN where x is infinite.
      for (int k = 0; k < kCount; ++k) total[k] = alone ? Vec<Real>{} : self * x[k];
      for (int32_t e = task.matrix.rowptr[row]; e < task.matrix.rowptr[row + 1]; ++e) {
        const int32_t col = task.matrix.col[e];
        Real weight = static_cast<Real>(task.value[e]);
        if (kGcn) weight *= task.scale[col];
        task.x.read(run, col, first, x);
        for (int k = 0; k < kCount; ++k) total[k] += weight * x[k];
      }
      for (int k = 0; k < kCount; ++k) total[k] *= scale;
      task.x.write(run, task.out, row, first, total);
    });
  }
}

template <bool kGcn, typename Stored>
ACGKD_SHARED void backward(const Backward<Stored>& task, WideOf<Stored>* dots, int64_t begin, int64_t end) {
  using Real = WideOf<Stored>;
  const bool alone = kGcn && task.self == 0;
  for (int64_t row = begin; row < end; ++row) {
    const Real scale = kGcn ? task.scale[row] : Real(1);
    const Real self = kGcn ? task.self * scale : task.self;
    const int32_t first_entry = task.transpose.rowptr[row], last_entry = task.transpose.rowptr[row + 1];
    std::fill_n(dots, last_entry - first_entry, Real(0));
    Real pairing = 0;
    for_runs<Real>(task.x.width(), [&](auto run, int64_t first) __attribute__((always_inline)) {
      constexpr int kCount = decltype(run)::kCount;
      Vec<Real> x[kCount], total[kCount], grad[kCount];
      Vec<Real> paired = {};
      task.x.read(run, row, first, x);
      task.grad_out.read(run, row, first, grad);
      if (kGcn) task.out.read(run, row, first, total);
      for (int k = 0; k < kCount; ++k) {
        paired += grad[k] * (kGcn ? total[k] : x[k]);
        total[k] = alone ? Vec<Real>{} : self * grad[k];
      }
      for (int32_t e = first_entry; e < last_entry; ++e) {
        const int32_t col = task.transpose.col[e];
        Real weight = static_cast<Real>(task.value[task.edge ? task.edge[e] : e]);
        if (kGcn) weight *= task.scale[col];
        Vec<Real> dot = {};
        task.grad_out.read(run, col, first, grad);
        for (int k = 0; k < kCount; ++k) {
          total[k] += weight * grad[k];
          dot += x[k] * grad[k];
        }
        dots[e - first_entry] += sum<Real>(dot);
      }
      for (int k = 0; k < kCount; ++k) {
        total[k] *= scale;
        if (kGcn) paired += x[k] * total[k];
      }
      task.x.write(run, task.grad_x, row, first, total);
      pairing += sum<Real>(paired);
    });
    // 1 / D = scale^2.
    const Real degree_term = Real(-0.5) * scale * scale * pairing;
    task.row_term[row] = kGcn ? degree_term : pairing;
    for (int32_t e = first_entry; e < last_entry; ++e) {
      const int32_t at = task.edge ? task.edge[e] : e;
      Real grad = dots[e - first_entry];
      if (kGcn) grad *= scale * task.scale[task.transpose.col[e]];
      if (task.partial) {
        task.partial[at] = grad;
      } else {
        task.grad_value[at] = static_cast<Stored>(kGcn ? grad + degree_term : grad);
      }
    }
  }
}

}  // namespace

// target_clones does not reach templates, hence one overload per type.
#define ACGKD_FOR_TYPE(Stored)                                                                                \
  ACGKD_CLONES static void forward_gcn(const Forward<Stored>& task, int64_t begin, int64_t end) {             \
    forward<true>(task, begin, end);                                                                          \
  }                                                                                                           \
  ACGKD_CLONES static void forward_gin(const Forward<Stored>& task, int64_t begin, int64_t end) {             \
    forward<false>(task, begin, end);                                                                         \
  }                                                                                                           \
  ACGKD_CLONES static void backward_gcn(const Backward<Stored>& task, WideOf<Stored>* dots, int64_t begin,    \
                                        int64_t end) {                                                        \
    backward<true>(task, dots, begin, end);                                                                   \
  }                                                                                                           \
  ACGKD_CLONES static void backward_gin(const Backward<Stored>& task, WideOf<Stored>* dots, int64_t begin,    \
                                        int64_t end) {                                                        \
    backward<false>(task, dots, begin, end);                                                                  \
  }                                                                                                           \
  template <>                                                                                                 \
  void forward_rows(const Forward<Stored>& task, int64_t begin, int64_t end) {                                \
    task.scale ? forward_gcn(task, begin, end) : forward_gin(task, begin, end);                               \
  }                                                                                                           \
  template <>                                                                                                 \
  void backward_rows(const Backward<Stored>& task, int64_t begin, int64_t end) {                              \
    std::vector<WideOf<Stored>> dots(task.transpose.longest_row(begin, end));                                 \
    task.scale ? backward_gcn(task, dots.data(), begin, end) : backward_gin(task, dots.data(), begin, end);     \
  }

ACGKD_FOR_TYPE(float)
ACGKD_FOR_TYPE(double)
ACGKD_FOR_TYPE(BFloat16)

}  // namespace acgkd
