// The draw of an edge sample: which pairs are in it and with what value.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "cpu/pairs.h"

namespace acgkd {

// What the edge operators take beside the logits and the layout.
struct Draw {
  Address address;
  double temperature;
  int64_t estimator, noise;
  double gamma, zeta, absent_rate;

  bool hard() const { return estimator >= kStraightThrough && estimator != kSparseStraightThrough; }
};

inline Draw make_draw(const char* op, const Tensor& rng, const Tensor& temperature, int64_t estimator, int64_t noise,
                      double gamma, double zeta, double absent_rate) {
  check(op, "rng", rng, ScalarType::Long, {2});
  check(op, "temperature", temperature, ScalarType::Double, {1});
  STD_TORCH_CHECK(estimator >= kRelaxed && estimator <= kArmMirrored, op, ": estimator: expected 0..5, got ", estimator);
  STD_TORCH_CHECK(noise == kLogistic || noise == kGumbel, op, ": noise: expected 0 or 1, got ", noise);
  const int64_t* words = read<int64_t>(rng);
  const Address address{key_of(words[0]), 0, static_cast<uint32_t>(words[1]), kEdgeStream};
  return {address, *read<double>(temperature), estimator, noise, gamma, zeta, absent_rate};
}

// The pairs of a sample in ascending order, by their number inside the graph. Values are kept only where they
// are not all 1.
template <typename Real>
class Hits {
 public:
  int64_t size() const { return size_; }
  int64_t pair(int64_t i) const { return pair_[i]; }
  Real value(int64_t i) const { return value_ ? value_[i] : Real(1); }

  // Gives back what growing took too much: a big graph has many chunks, most of them with few hits.
  void shrink() {
    pair_ = resized(pair_, size_);
    if (value_) value_ = resized(value_, size_);
    capacity_ = size_;
  }

  // Appends first + i with value_of(i) for every set bit i.
  template <typename Function>
  void append(int64_t first, uint64_t mask, const Function& value_of) {
    if (size_ + kLanes > capacity_) grow(true);
    for (; mask; mask &= mask - 1) {
      const int lane = __builtin_ctzll(mask);
      value_[size_] = value_of(lane);
      pair_[size_++] = first + lane;
    }
  }

  // The same for values that are all 1; to be called always or never.
  void append(int64_t first, uint64_t mask) {
    if (size_ + kLanes > capacity_) grow(false);
    for (; mask; mask &= mask - 1) pair_[size_++] = first + __builtin_ctzll(mask);
  }

 private:
  void grow(bool with_values) {
    const int64_t capacity = std::max<int64_t>(2 * capacity_, 4 * kLanes);
    pair_ = resized(pair_, capacity);
    if (with_values) value_ = resized(value_, capacity);
    capacity_ = capacity;
  }

  template <typename T>
  std::unique_ptr<T[]> resized(const std::unique_ptr<T[]>& old, int64_t capacity) const {
    std::unique_ptr<T[]> fresh(new T[capacity]);
    std::copy_n(old.get(), size_, fresh.get());
    return fresh;
  }

  int64_t size_ = 0, capacity_ = 0;
  std::unique_ptr<int64_t[]> pair_;
  std::unique_ptr<Real[]> value_;
};

// Part of one graph, and where its hits stand in the list of its chunk.
struct Piece : PairRange {
  int64_t chunk;
  int64_t hits_begin = 0, hits_end = 0;
};

// The whole sample before it is laid out in rows.
template <typename Real>
struct Drawn {
  std::vector<Piece> pieces;
  // pieces of graph g: piece_ptr[g] .. piece_ptr[g + 1] - 1.
  std::vector<int64_t> piece_ptr;
  std::vector<Hits<Real>> chunks;
};

// Writes the logits of pairs first .. first + count - 1 of a graph to a block, whose rest becomes 0.
template <typename Real>
using LogitSource = std::function<void(const GraphLayout& graph, int64_t first, int count, Real* theta)>;

// Draws every pair; parallel over chunks of pairs whose bounds depend on the layout only.
template <typename Real>
Drawn<Real> draw_pairs(const LogitSource<Real>& logits, const Layouts& layouts, const Draw& draw);

}  // namespace acgkd
