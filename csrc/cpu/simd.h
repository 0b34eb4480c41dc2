// Short vectors of feature channels. They are spelt out, as loops over small arrays are vectorised unreliably.
#pragma once

#include <torch/headeronly/util/BFloat16.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/vector.h"

namespace acgkd {

using torch::headeronly::BFloat16;

#if defined(__x86_64__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <typename Real>
struct VectorOf {
  typedef Real Type __attribute__((vector_size(kVectorBytes)));
  typedef typename Format<Real>::Int Mask __attribute__((vector_size(kVectorBytes)));
};
template <typename Real>
using Vec = typename VectorOf<Real>::Type;
template <typename Real>
using VecMask = typename VectorOf<Real>::Mask;
template <typename Real>
constexpr int kWidth = kVectorBytes / static_cast<int>(sizeof(Real));

template <typename Real>
ACGKD_SHARED Vec<Real> load(const Real* from) {
  Vec<Real> v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

ACGKD_SHARED Vec<float> load(const BFloat16* from) {
  typedef uint16_t Half __attribute__((vector_size(kVectorBytes / 2)));
  typedef uint32_t Word __attribute__((vector_size(kVectorBytes)));
  Half bits;
  std::memcpy(&bits, from, sizeof bits);
  const Word words = __builtin_convertvector(bits, Word) << 16;
  return bits_as<Vec<float>>(words);
}

// The first `bytes` bytes of a vector, fewer than all of them; a loop would become a call of memcpy.
template <typename Vector>
ACGKD_SHARED void store_head(void* to, const Vector& v, int bytes) {
  char* out = static_cast<char*>(to);
  const char* in = reinterpret_cast<const char*>(&v);
  const auto part = [&](auto size) __attribute__((always_inline)) {
    if (!(bytes & decltype(size)::value)) return;
    std::memcpy(out, in, decltype(size)::value);
    out += decltype(size)::value, in += decltype(size)::value;
  };
  part(std::integral_constant<int, 16>());
  part(std::integral_constant<int, 8>());
  part(std::integral_constant<int, 4>());
  part(std::integral_constant<int, 2>());
}

template <typename Real>
ACGKD_SHARED void store(Real* to, Vec<Real> v, int count) {
  if (count == kWidth<Real>) {
    std::memcpy(to, &v, sizeof v);
  } else {
    store_head(to, v, count * static_cast<int>(sizeof(Real)));
  }
}

ACGKD_SHARED void store(BFloat16* to, Vec<float> v, int count) {
  typedef uint16_t Half __attribute__((vector_size(kVectorBytes / 2)));
  typedef uint32_t Word __attribute__((vector_size(kVectorBytes)));
  const Word bits = bits_as<Word>(v);
  // To the nearest, ties to even; a NaN could round to infinity.
  const Word rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  const Word is_nan = bits_as<Word>(v != v);
  const Half halves = __builtin_convertvector((rounded & ~is_nan) | (is_nan & 0x7FC0u), Half);
  if (count == kWidth<float>) {
    std::memcpy(to, &halves, sizeof halves);
  } else {
    store_head(to, halves, 2 * count);
  }
}

template <typename Real>
ACGKD_SHARED Real sum(Vec<Real> v) {
  // Halves first: two vector additions instead of a chain of scalar ones.
  typedef Real Half __attribute__((vector_size(kVectorBytes / 2)));
  Half low, high;
  std::memcpy(&low, &v, sizeof low);
  std::memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof low, sizeof high);
  const Half halves = low + high;
  Real total = halves[0];
  for (int i = 1; i < kWidth<Real> / 2; ++i) total += halves[i];
  return total;
}

// Bits set in the first `count` channels.
template <typename Real>
ACGKD_SHARED VecMask<Real> first_channels(int count) {
  VecMask<Real> mask;
  for (int i = 0; i < kWidth<Real>; ++i) mask[i] = i < count ? -1 : 0;
  return mask;
}

// A run of kCount vectors of channels; the tail run is the single, narrower vector at the end of a row.
template <int kCount_, bool kTail_>
struct Run {
  static constexpr int kCount = kCount_;
  static constexpr bool kTail = kTail_;
};

// Calls function(run, first channel) for all channels, in runs short enough to keep accumulators in registers.
template <typename Real, typename Function>
ACGKD_SHARED void for_runs(int64_t width, const Function& function) {
  constexpr int64_t kLane = kWidth<Real>;
  int64_t first = 0;
  for (; first + 8 * kLane <= width; first += 8 * kLane) function(Run<8, false>(), first);
  if (width & (4 * kLane)) function(Run<4, false>(), first), first += 4 * kLane;
  if (width & (2 * kLane)) function(Run<2, false>(), first), first += 2 * kLane;
  if (width & kLane) function(Run<1, false>(), first), first += kLane;
  if (first < width) function(Run<1, true>(), first);
}

// A feature matrix [rows, width], read by runs; channels behind the tail read as zeros.
template <typename Stored, typename Real>
class Features {
 public:
  Features(const Stored* data, int64_t rows, int64_t width)
      : data_(data),
        end_(data + rows * width),
        width_(width),
        tail_size_(static_cast<int>(width % kWidth<Real>)),
        tail_(first_channels<Real>(tail_size_)) {}

  int64_t width() const { return width_; }

  // Channels first .. first + kWidth - 1 of a row.
  ACGKD_SHARED Vec<Real> full(int64_t row, int64_t first) const { return load(data_ + row * width_ + first); }

  // The channels from `first` to the end of the row, fewer than kWidth.
  ACGKD_SHARED Vec<Real> tail(int64_t row, int64_t first) const { return tail_at(data_ + row * width_ + first); }

  template <typename Run>
  ACGKD_SHARED void read(Run, int64_t row, int64_t first, Vec<Real>* to) const {
    const Stored* from = data_ + row * width_ + first;
    if constexpr (Run::kTail) {
      to[0] = tail_at(from);
    } else {
      for (int k = 0; k < Run::kCount; ++k) to[k] = load(from + k * kWidth<Real>);
    }
  }

  template <typename Run>
  ACGKD_SHARED void write(Run, Stored* base, int64_t row, int64_t first, const Vec<Real>* from) const {
    Stored* to = base + row * width_ + first;
    for (int k = 0; k < Run::kCount; ++k) {
      store(to + k * kWidth<Real>, from[k], Run::kTail ? tail_size_ : kWidth<Real>);
    }
  }

 private:
  ACGKD_SHARED Vec<Real> tail_at(const Stored* from) const {
    // Reading on into the next row is cheap, and safe except at the very end.
    if (from + kWidth<Real> <= end_) {
      return bits_as<Vec<Real>>(static_cast<VecMask<Real>>(bits_as<VecMask<Real>>(load(from)) & tail_));
    }
    Vec<Real> v = {};
    for (int i = 0; i < tail_size_; ++i) v[i] = static_cast<Real>(from[i]);
    return v;
  }

  const Stored *data_, *end_;
  int64_t width_;
  int tail_size_;
  VecMask<Real> tail_;
};

}  // namespace acgkd
