// Philox4x32-10 (Salmon et al., SC 2011), shared by C++ and CUDA.
// A draw is addressed: key = seed, counter = (pair // 4, graph id, step, stream), lane = pair % 4.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define ACGKD_SHARED __host__ __device__ __forceinline__
#elif defined(__GNUC__)
// Inlined into each instruction-set clone of its caller; see cpu/vector.h.
#define ACGKD_SHARED inline __attribute__((always_inline))
#else
#define ACGKD_SHARED inline
#endif

namespace acgkd {

constexpr int kPhiloxRounds = 10;

enum Stream : uint32_t { kEdgeStream = 0, kAbsentStream = 1, kNumStreams = 6 };

struct Key {
  uint32_t low, high;
};

ACGKD_SHARED Key key_of(int64_t seed) {
  return {static_cast<uint32_t>(seed), static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32)};
}

constexpr uint32_t kMultiplier0 = 0xD2511F53u, kMultiplier1 = 0xCD9E8D57u;
constexpr uint32_t kKeyStep0 = 0x9E3779B9u, kKeyStep1 = 0xBB67AE85u;

ACGKD_SHARED void advance(Key& key) {
  key.low += kKeyStep0;
  key.high += kKeyStep1;
}

// Replaces the counter words by the four output words.
ACGKD_SHARED void philox(uint32_t& c0, uint32_t& c1, uint32_t& c2, uint32_t& c3, Key key) {
  for (int round = 0; round < kPhiloxRounds; ++round, advance(key)) {
    const uint64_t product0 = static_cast<uint64_t>(c0) * kMultiplier0;
    const uint64_t product1 = static_cast<uint64_t>(c2) * kMultiplier1;
    c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ key.low;
    c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ key.high;
    c1 = static_cast<uint32_t>(product1);
    c3 = static_cast<uint32_t>(product0);
  }
}

// Exact in float32, and never 0 or 1.
template <typename Real>
ACGKD_SHARED Real uniform_of(uint32_t word) {
  // A signed conversion is one vector instruction where an unsigned one is several.
  return (static_cast<Real>(static_cast<int32_t>(word >> 9)) + Real(0.5)) * Real(1.0 / (1 << 23));
}

}  // namespace acgkd
