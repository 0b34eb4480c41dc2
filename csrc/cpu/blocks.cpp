#include "cpu/blocks.h"

#include <algorithm>

namespace acgkd {
namespace {

// Packs 64 bytes of 0 or 1 into bits; each product gathers the low bits of eight bytes in its top byte.
ACGKD_SHARED uint64_t pack(const uint8_t* flags) {
  uint64_t mask = 0;
  for (int group = 0; group < kLanes / 8; ++group) {
    uint64_t bytes;
    std::memcpy(&bytes, flags + 8 * group, 8);
    mask |= ((bytes * 0x0102040810204080u) >> 56) << (8 * group);
  }
  return mask;
}

template <typename Real>
ACGKD_SHARED void uniforms(const uint32_t* words, bool mirrored, Real* u) {
  for (int i = 0; i < kLanes; ++i) u[i] = uniform_of<Real>(words[i]);
  if (mirrored) {
    for (int i = 0; i < kLanes; ++i) u[i] = Real(1) - u[i];
  }
}

// Without the noise itself: theta + L > 0 where u exp(theta) > 1 - u (logistic) or exp(theta) > -log u (Gumbel).
template <typename Real>
ACGKD_SHARED uint64_t drawn(const Real* theta, const Real* u, int64_t noise) {
  uint8_t flags[kLanes];
  if (noise == kLogistic) {
    for (int i = 0; i < kLanes; ++i) flags[i] = u[i] * exponential(theta[i]) > Real(1) - u[i];
  } else {
    for (int i = 0; i < kLanes; ++i) flags[i] = exponential(theta[i]) > -logarithm(u[i]);
  }
  return pack(flags);
}

template <typename Real>
ACGKD_SHARED void scaled(const Real* theta, const Real* u, int64_t noise, Real temperature, Real* z) {
  if (noise == kLogistic) {
    // 1 - u is exact.
    for (int i = 0; i < kLanes; ++i) z[i] = (theta[i] + logarithm(u[i] / (Real(1) - u[i]))) / temperature;
  } else {
    for (int i = 0; i < kLanes; ++i) z[i] = (theta[i] - logarithm(-logarithm(u[i]))) / temperature;
  }
}

template <typename Real>
ACGKD_SHARED void soft(const Real* z, Real* out) {
  for (int i = 0; i < kLanes; ++i) out[i] = Real(1) / (Real(1) + exponential(-z[i]));
}

template <typename Real>
ACGKD_SHARED void bell(const Real* z, Real* out) {
  for (int i = 0; i < kLanes; ++i) {
    const Real small = exponential(z[i] < Real(0) ? z[i] : -z[i]);
    out[i] = small / ((Real(1) + small) * (Real(1) + small));
  }
}

template <typename Real>
ACGKD_SHARED uint64_t absent(const Real* u, const Real* bell, Real rate) {
  uint8_t flags[kLanes];
  for (int i = 0; i < kLanes; ++i) flags[i] = u[i] < rate * Real(4) * bell[i];
  return pack(flags);
}

template <typename Real>
ACGKD_SHARED void weigh(uint64_t drawn, Real rate, Real* slope) {
  for (int i = 0; i < kLanes; ++i) {
    const Real chance = std::min(Real(1), Real(4) * rate * slope[i]);
    const Real weighed = chance > Real(0) ? slope[i] / chance : Real(0);
    slope[i] = drawn >> i & 1 ? slope[i] : weighed;
  }
}

template <typename Real>
ACGKD_SHARED SparseDraw sparse(const Real* theta, const uint32_t* words, Real rate) {
  uint8_t drawn[kLanes], absent[kLanes];
  for (int i = 0; i < kLanes; ++i) {
    const Real u = uniform_of<Real>(words[i]), v = uniform_of<Real>(words[kLanes + i]);
    const Real odds = u * exponential(theta[i]), rest = Real(1) - u, both = odds + rest;
    drawn[i] = odds > rest;
    // Where this overflows the pair is drawn anyway.
    absent[i] = v * (both * both) < Real(4) * rate * (odds * rest);
  }
  return {pack(drawn), pack(absent)};
}

}  // namespace

// target_clones does not reach templates, hence one overload per type.
#define ACGKD_FOR_TYPE(Real)                                                                                 \
  template <>                                                                                                \
  ACGKD_CLONES void uniforms_block<Real>(const uint32_t* words, bool mirrored, Real* u) {                    \
    uniforms(words, mirrored, u);                                                                            \
  }                                                                                                          \
  template <>                                                                                                \
  ACGKD_CLONES uint64_t drawn_block<Real>(const Real* theta, const Real* u, int64_t noise) {                 \
    return drawn(theta, u, noise);                                                                           \
  }                                                                                                          \
  template <>                                                                                                \
  ACGKD_CLONES void scaled_block<Real>(const Real* theta, const Real* u, int64_t noise, Real t, Real* z) {   \
    scaled(theta, u, noise, t, z);                                                                           \
  }                                                                                                          \
  template <>                                                                                                \
  ACGKD_CLONES void soft_block<Real>(const Real* z, Real* out) {                                             \
    soft(z, out);                                                                                            \
  }                                                                                                          \
  template <>                                                                                                \
  ACGKD_CLONES void bell_block<Real>(const Real* z, Real* out) {                                             \
    bell(z, out);                                                                                            \
  }                                                                                                          \
  template <>                                                                                                \
  ACGKD_CLONES uint64_t absent_block<Real>(const Real* u, const Real* bell, Real rate) {                     \
    return absent(u, bell, rate);                                                                            \
  }                                                                                                          \
  template <>                                                                                                \
  ACGKD_CLONES void weigh_block<Real>(uint64_t drawn, Real rate, Real* slope) {                              \
    weigh(drawn, rate, slope);                                                                               \
  }                                                                                                          \
  template <>                                                                                                \
  ACGKD_CLONES SparseDraw sparse_block<Real>(const Real* theta, const uint32_t* words, Real rate) {          \
    return sparse(theta, words, rate);                                                                       \
  }

ACGKD_FOR_TYPE(float)
ACGKD_FOR_TYPE(double)

}  // namespace acgkd
