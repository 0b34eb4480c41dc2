// adam_step: one pass over a parameter and its moments, the gradient dense or given at few places.
#include <algorithm>
#include <cmath>
#include <optional>

#include "cpu/matrix.h"
#include "cpu/tensors.h"
#include "cpu/vector.h"

namespace acgkd {
namespace {

// Values that are brought up to date together, while the few gradients among them stand in a buffer of zeros that
// stays in the first-level cache.
constexpr int64_t kBlock = 1024;

// The step's constants; see acgkd_fast/optim/reference.py.
template <typename Real>
struct Rates {
  Real beta1, beta2, step, root_correction, eps;
};

template <typename Stored, typename Real>
ACGKD_SHARED void update(const Rates<Real>& given, int64_t count, const Stored* grad, Stored* param, Stored* average,
                         Stored* square) {
  // A copy, as a reference might change with every value that is written.
  const Rates<Real> rates = given;
  const Real more1 = Real(1) - rates.beta1, more2 = Real(1) - rates.beta2;
  for (int64_t i = 0; i < count; ++i) {
    const Real g = static_cast<Real>(grad[i]);
    const Real m = rates.beta1 * static_cast<Real>(average[i]) + more1 * g;
    const Real v = rates.beta2 * static_cast<Real>(square[i]) + more2 * (g * g);
    average[i] = static_cast<Stored>(m);
    square[i] = static_cast<Stored>(v);
    param[i] = static_cast<Stored>(static_cast<Real>(param[i]) -
                                   rates.step * m / (std::sqrt(v) * rates.root_correction + rates.eps));
  }
}

// target_clones does not reach templates, hence one overload per type.
#define ACGKD_FOR_TYPE(Stored)                                                                                      \
  ACGKD_CLONES void run_update(const Rates<WideOf<Stored>>& rates, int64_t count, const Stored* grad, Stored* param, \
                               Stored* average, Stored* square) {                                                   \
    update(rates, count, grad, param, average, square);                                                             \
  }
ACGKD_FOR_TYPE(float)
ACGKD_FOR_TYPE(double)
ACGKD_FOR_TYPE(BFloat16)
#undef ACGKD_FOR_TYPE

// The gradients of values begin .. end - 1 that are given, among zeros.
template <typename Stored>
class Scattered {
 public:
  Scattered(const int64_t* index, const Stored* grad, int64_t count) : index_(index), grad_(grad), count_(count) {}

  void enter(int64_t begin) { at_ = std::lower_bound(index_, index_ + count_, begin) - index_; }

  const Stored* fill(int64_t begin, int64_t end) {
    const int64_t from = at_;
    for (; at_ < count_ && index_[at_] < end; ++at_) buffer_[index_[at_] - begin] = grad_[at_];
    filled_begin_ = from, first_ = begin;
    return buffer_;
  }

  void clear() {
    for (int64_t i = filled_begin_; i < at_; ++i) buffer_[index_[i] - first_] = Stored(0);
  }

 private:
  const int64_t* index_;
  const Stored* grad_;
  int64_t count_, at_ = 0, filled_begin_ = 0, first_ = 0;
  alignas(64) Stored buffer_[kBlock] = {};
};

void adam_step(const Tensor& param, const Tensor& average, const Tensor& square, const std::optional<Tensor>& index,
               const Tensor& grad, double lr, double beta1, double beta2, double eps, int64_t step) {
  const char* op = "adam_step_";
  const int64_t size = param.numel();
  for (const auto& [name, tensor] : {std::pair{"param", &param}, {"exp_avg", &average}, {"exp_avg_sq", &square}}) {
    STD_TORCH_CHECK(tensor->is_cpu() && tensor->is_contiguous() && tensor->numel() == size &&
                        tensor->scalar_type() == param.scalar_type(),
                    op, ": ", name, ": expected a contiguous cpu tensor like param, got a ", describe(*tensor));
  }
  STD_TORCH_CHECK(step >= 1, op, ": step: expected 1 or more, got ", step);
  const int64_t* places = nullptr;
  if (index.has_value()) {
    check(op, "index", *index, ScalarType::Long, {kAny});
    check(op, "grad", grad, param.scalar_type(), {index->size(0)});
    places = read<int64_t>(*index);
    check_range(op, "index", places, index->size(0), size);
    bool ascending = true;
    for (int64_t i = 1; i < index->size(0); ++i) ascending &= places[i - 1] < places[i];
    STD_TORCH_CHECK(ascending, op, ": index: expected ascending places without repetition, got others");
  } else {
    STD_TORCH_CHECK(grad.is_cpu() && grad.is_contiguous() && grad.numel() == size &&
                        grad.scalar_type() == param.scalar_type(),
                    op, ": grad: expected a contiguous cpu tensor like param, got a ", describe(grad));
  }
  by_dtype(op, param, [&](auto* type) {
    using Stored = std::remove_pointer_t<decltype(type)>;
    using Real = WideOf<Stored>;
    const double correction1 = 1.0 - std::pow(beta1, static_cast<double>(step));
    const double correction2 = 1.0 - std::pow(beta2, static_cast<double>(step));
    const Rates<Real> rates{static_cast<Real>(beta1), static_cast<Real>(beta2), static_cast<Real>(lr / correction1),
                            static_cast<Real>(1.0 / std::sqrt(correction2)), static_cast<Real>(eps)};
    Stored *values = write<Stored>(param), *averages = write<Stored>(average), *squares = write<Stored>(square);
    const Stored* given = read<Stored>(grad);
    torch::stable::parallel_for(0, size, 16 * kBlock, [&](int64_t begin, int64_t end) {
      // Not `places`, which is null where there are none.
      if (!index.has_value()) {
        run_update(rates, end - begin, given + begin, values + begin, averages + begin, squares + begin);
        return;
      }
      Scattered<Stored> scattered(places, given, index->size(0));
      scattered.enter(begin);
      for (int64_t first = begin; first < end; first += kBlock) {
        const int64_t last = std::min(end, first + kBlock);
        run_update(rates, last - first, scattered.fill(first, last), values + first, averages + first, squares + first);
        scattered.clear();
      }
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(acgkd_fast, CPU, m) { m.impl("adam_step_", TORCH_BOX(&adam_step)); }

}  // namespace acgkd
