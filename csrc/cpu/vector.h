// Blocks of 64 pairs and the elementary functions on them, written so that compilers vectorise them.
#pragma once

#include <cstdint>
#include <cstring>

#include "philox.h"

// One body is compiled for several instruction sets and chosen when the library loads.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define ACGKD_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define ACGKD_CLONES
#endif

namespace acgkd {

constexpr int kLanes = 64;

template <typename To, typename From>
ACGKD_SHARED To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

template <typename Real>
struct Format;

template <>
struct Format<float> {
  using Int = int32_t;
  static constexpr int kMantissa = 23, kBias = 127, kExpTerms = 7, kLogTerms = 5;
  static constexpr float kLowest = -104.0f, kHighest = 89.0f;
  // ln 2 in two parts: the first has few bits, so that its multiples are exact.
  static constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
};

template <>
struct Format<double> {
  using Int = int64_t;
  static constexpr int kMantissa = 52, kBias = 1023, kExpTerms = 13, kLogTerms = 11;
  static constexpr double kLowest = -746.0, kHighest = 710.0;
  static constexpr double kLn2High = 6.93147180369123816490e-01, kLn2Low = 1.90821492927058770002e-10;
};

// 2^k by its bits, k in the range of normal numbers.
template <typename Real>
ACGKD_SHARED Real power_of_two(typename Format<Real>::Int k) {
  using Int = typename Format<Real>::Int;
  return bits_as<Real>(static_cast<Int>((k + Format<Real>::kBias) << Format<Real>::kMantissa));
}

constexpr double inverse_factorial(int n) { return n <= 1 ? 1.0 : inverse_factorial(n - 1) / n; }

// 1 / term! + r / (term + 1)! + ... up to r^last. Recursive, because loops of this length stay loops, and a loop
// inside keeps the one over lanes from being vectorised.
template <int term, int last, typename Real>
ACGKD_SHARED Real exponential_series(Real r) {
  if constexpr (term == last) {
    return Real(inverse_factorial(term));
  } else {
    return exponential_series<term + 1, last>(r) * r + Real(inverse_factorial(term));
  }
}

// 1 / (2 term + 1) + square / (2 term + 3) + ...
template <int term, int last, typename Real>
ACGKD_SHARED Real arctangent_series(Real square) {
  if constexpr (term == last) {
    return Real(1) / Real(2 * term + 1);
  } else {
    return arctangent_series<term + 1, last>(square) * square + Real(1) / Real(2 * term + 1);
  }
}

// exp(x): x = k ln 2 + r, Taylor series in r. About 1 ulp; 0 and infinity where they belong, NaN stays NaN.
template <typename Real>
ACGKD_SHARED Real exponential(Real x) {
  using F = Format<Real>;
  using Int = typename F::Int;
  x = x < F::kLowest ? F::kLowest : x;
  x = x > F::kHighest ? F::kHighest : x;
  // Adding 1.5 * 2^mantissa rounds to an integer, left in the low bits.
  const Real magic = Real(1.5) * Real(Int(1) << F::kMantissa);
  const Real shifted = x * Real(1.4426950408889634074) + magic;
  const Real count = shifted - magic;
  const Int k = bits_as<Int>(shifted) - bits_as<Int>(magic);
  const Real r = (x - count * F::kLn2High) - count * F::kLn2Low;
  const Real sum = exponential_series<0, F::kExpTerms>(r);
  // In two steps, because 2^k alone overflows or vanishes at the ends of the range.
  const Int half = k >> 1;
  return sum * power_of_two<Real>(half) * power_of_two<Real>(k - half);
}

// log(x) for positive normal x: x = 2^k m with m in [2/3, 4/3), log m = 2 atanh((m - 1) / (m + 1)). About 2 ulp.
template <typename Real>
ACGKD_SHARED Real logarithm(Real x) {
  using F = Format<Real>;
  using Int = typename F::Int;
  const Int bits = bits_as<Int>(x);
  const Int k = (bits - bits_as<Int>(Real(2) / Real(3))) >> F::kMantissa;
  const Real m = bits_as<Real>(static_cast<Int>(bits - (k << F::kMantissa)));
  const Real s = (m - Real(1)) / (m + Real(1));
  const Real square = s * s;
  const Real sum = arctangent_series<1, F::kLogTerms>(square);
  const Real count = static_cast<Real>(k);
  return (count * F::kLn2Low + (Real(2) * s + Real(2) * s * square * sum)) + count * F::kLn2High;
}

}  // namespace acgkd
