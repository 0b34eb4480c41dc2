#include "cpu/matrix.h"

#include <algorithm>

#include "cpu/vector.h"

namespace acgkd {
namespace {

template <typename Int>
struct Span {
  Int low, high;
};

template <typename Int>
ACGKD_SHARED Span<Int> span(const Int* values, int64_t count) {
  Int low = 0, high = 0;
  for (int64_t i = 0; i < count; ++i) {
    low = std::min(low, values[i]);
    high = std::max(high, values[i]);
  }
  return {low, high};
}

// The baseline instruction set has no minimum of integers, and every operator checks its indices in every call.
ACGKD_CLONES Span<int32_t> span_of(const int32_t* values, int64_t count) { return span(values, count); }
ACGKD_CLONES Span<int64_t> span_of(const int64_t* values, int64_t count) { return span(values, count); }

template <typename Int>
void check_span(const char* op, const char* name, const Int* values, int64_t count, int64_t bound) {
  const Span<Int> found = span_of(values, count);
  STD_TORCH_CHECK(count == 0 || (found.low >= 0 && found.high < bound), op, ": ", name, ": expected values in 0..",
                  bound - 1, ", got ", found.low < 0 ? found.low : found.high);
}

}  // namespace

void check_range(const char* op, const char* name, const int32_t* values, int64_t count, int64_t bound) {
  check_span(op, name, values, count, bound);
}

void check_range(const char* op, const char* name, const int64_t* values, int64_t count, int64_t bound) {
  check_span(op, name, values, count, bound);
}

}  // namespace acgkd
