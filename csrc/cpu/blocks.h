// Random words, decisions and soft values of 64 pairs at a time.
#pragma once

#include <cstdint>

#include "cpu/vector.h"
#include "philox.h"

namespace acgkd {

// Codes of acgkd_fast/edges/estimators.py.
enum Estimator : int64_t {
  kRelaxed = 0,
  kHardConcrete = 1,
  kStraightThrough = 2,
  kSparseStraightThrough = 3,
  kArm = 4,
  kArmMirrored = 5
};
enum Noise : int64_t { kLogistic = 0, kGumbel = 1 };

struct Address {
  Key key;
  uint32_t graph, step, stream;
};

// Words of the 64 consecutive pairs whose first is 4 * `counter`.
void words_block(const Address& address, uint32_t counter, uint32_t* words);

// The same for the address's own stream and for another: 128 words.
void words_two_streams(const Address& address, uint32_t other_stream, uint32_t counter, uint32_t* words);

// Words of 64 scattered pairs: counter and lane of each, and the id of its graph.
void words_scattered(const Address& address, const uint32_t* counters, const uint32_t* lanes, const uint32_t* graphs,
                     uint32_t* words);

// The functions below work on kLanes values. Forward and backward share them, so that both see the same bits.
template <typename Real>
void uniforms_block(const uint32_t* words, bool mirrored, Real* u);

// Bit i is set where theta + L > 0.
template <typename Real>
uint64_t drawn_block(const Real* theta, const Real* u, int64_t noise);

// z = (theta + L) / temperature.
template <typename Real>
void scaled_block(const Real* theta, const Real* u, int64_t noise, Real temperature, Real* z);

// s = sigmoid(z).
template <typename Real>
void soft_block(const Real* z, Real* soft);

// s (1 - s), accurate at both ends.
template <typename Real>
void bell_block(const Real* z, Real* bell);

// Bit i is set where u < min(1, 4 rate bell).
template <typename Real>
uint64_t absent_block(const Real* u, const Real* bell, Real rate);

// Slopes of sparse straight-through: absent pairs are weighed by their chance to be stored.
template <typename Real>
void weigh_block(uint64_t drawn, Real rate, Real* slope);

// Sparse straight-through at temperature 1 under logistic noise: both decisions from the words of the two streams.
// With odds = exp(theta) u and rest = 1 - u, theta + L > 0 is odds > rest, and s (1 - s) = odds rest / (odds + rest)^2:
// one exponential, no logarithm, no division.
struct SparseDraw {
  uint64_t drawn, absent;
};
template <typename Real>
SparseDraw sparse_block(const Real* theta, const uint32_t* words, Real rate);

}  // namespace acgkd
