// Philox for 16 or 32 counters at a time. Compilers turn its 32 x 32 -> 64 bit products into several full ones, or into
// shuffles of half-filled vectors, which costs twice the time; the two instruction sets that matter are spelt out.
#include "cpu/blocks.h"

#include <algorithm>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>
#endif

namespace acgkd {
namespace {

constexpr int kCounters = kLanes / 4;

// Counters c0[i], c1[i], step, c3[i]; words[4 i + lane]. The number of counters is part of the name.
using Philox = void (*)(const Address&, const uint32_t* c0, const uint32_t* c1, const uint32_t* c3, uint32_t* words);

template <int kCount>
void philox_portable(const Address& address, const uint32_t* c0, const uint32_t* c1, const uint32_t* c3,
                     uint32_t* words) {
  uint32_t out[4][kCount];
  for (int i = 0; i < kCount; ++i) {
    uint32_t w0 = c0[i], w1 = c1[i], w2 = address.step, w3 = c3[i];
    philox(w0, w1, w2, w3, address.key);
    out[0][i] = w0, out[1][i] = w1, out[2][i] = w2, out[3][i] = w3;
  }
  for (int i = 0; i < kCount; ++i) {
    for (int lane = 0; lane < 4; ++lane) words[4 * i + lane] = out[lane][i];
  }
}

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)

// Each 64-bit lane holds one 32-bit word below bits that nobody reads: products use the low half only.
// A macro, as neither templates nor lambdas take the instruction set of the function around them.
#define ACGKD_PHILOX(name, isa, width, count, Register, multiply)                                                  \
  __attribute__((target(isa))) void name(const Address& address, const uint32_t* c0, const uint32_t* c1,           \
                                         const uint32_t* c3, uint32_t* words) {                                    \
    typedef uint64_t Lanes __attribute__((vector_size(8 * width)));                                                \
    typedef uint32_t Words __attribute__((vector_size(4 * width)));                                                \
    constexpr int kGroups = count / width;                                                                         \
    const Lanes first = Lanes{} + kMultiplier0, second = Lanes{} + kMultiplier1, low = Lanes{} + 0xFFFFFFFFu;      \
    Lanes w0[kGroups], w1[kGroups], w2[kGroups], w3[kGroups];                                                      \
    for (int g = 0; g < kGroups; ++g) {                                                                            \
      Words a, b, d;                                                                                               \
      std::memcpy(&a, c0 + g * width, sizeof a);                                                                   \
      std::memcpy(&b, c1 + g * width, sizeof b);                                                                   \
      std::memcpy(&d, c3 + g * width, sizeof d);                                                                   \
      w0[g] = __builtin_convertvector(a, Lanes);                                                                   \
      w1[g] = __builtin_convertvector(b, Lanes);                                                                   \
      w2[g] = Lanes{} + address.step;                                                                              \
      w3[g] = __builtin_convertvector(d, Lanes);                                                                   \
    }                                                                                                              \
    Lanes key_low = Lanes{} + address.key.low, key_high = Lanes{} + address.key.high;                              \
    for (int round = 0; round < kPhiloxRounds; ++round) {                                                          \
      for (int g = 0; g < kGroups; ++g) {                                                                          \
        const Lanes product0 = (Lanes)multiply((Register)w0[g], (Register)first);                                  \
        const Lanes product1 = (Lanes)multiply((Register)w2[g], (Register)second);                                 \
        w0[g] = (product1 >> 32) ^ w1[g] ^ key_low;                                                                \
        w2[g] = (product0 >> 32) ^ w3[g] ^ key_high;                                                               \
        w1[g] = product1;                                                                                          \
        w3[g] = product0;                                                                                          \
      }                                                                                                            \
      key_low += kKeyStep0, key_high += kKeyStep1;                                                                 \
    }                                                                                                              \
    Lanes front_half, back_half;                                                                                   \
    for (int i = 0; i < width; ++i) {                                                                              \
      front_half[i] = i / 2 + (i % 2) * width;                                                                     \
      back_half[i] = front_half[i] + width / 2;                                                                    \
    }                                                                                                              \
    for (int g = 0; g < kGroups; ++g) {                                                                            \
      const Lanes head = (w0[g] & low) | (w1[g] << 32), tail = (w2[g] & low) | (w3[g] << 32);                      \
      const Lanes ordered[2] = {__builtin_shuffle(head, tail, front_half),                                         \
                                __builtin_shuffle(head, tail, back_half)};                                         \
      std::memcpy(words + 4 * g * width, ordered, sizeof ordered);                                                 \
    }                                                                                                              \
  }

// With a full mask, since GCC 12 warns of an uninitialised operand inside the plain form.
#define ACGKD_MULTIPLY512(a, b) _mm512_maskz_mul_epu32(0xFF, a, b)

ACGKD_PHILOX(philox16_avx512, "avx512f,avx512vl,avx512dq", 8, kCounters, __m512i, ACGKD_MULTIPLY512)
ACGKD_PHILOX(philox32_avx512, "avx512f,avx512vl,avx512dq", 8, 2 * kCounters, __m512i, ACGKD_MULTIPLY512)
ACGKD_PHILOX(philox16_avx2, "avx2", 4, kCounters, __m256i, _mm256_mul_epu32)

// 16 registers hold the state of two groups of four, not of eight.
void philox32_avx2(const Address& address, const uint32_t* c0, const uint32_t* c1, const uint32_t* c3,
                   uint32_t* words) {
  philox16_avx2(address, c0, c1, c3, words);
  philox16_avx2(address, c0 + kCounters, c1 + kCounters, c3 + kCounters, words + kLanes);
}

Philox choose(Philox avx512, Philox avx2, Philox portable) {
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
    return avx512;
  }
  return __builtin_cpu_supports("avx2") ? avx2 : portable;
}

const Philox philox16 = choose(philox16_avx512, philox16_avx2, philox_portable<kCounters>);
const Philox philox32 = choose(philox32_avx512, philox32_avx2, philox_portable<2 * kCounters>);

#else

constexpr Philox philox16 = philox_portable<kCounters>;
constexpr Philox philox32 = philox_portable<2 * kCounters>;

#endif

}  // namespace

void words_block(const Address& address, uint32_t counter, uint32_t* words) {
  uint32_t c0[kCounters], c1[kCounters], c3[kCounters];
  for (int i = 0; i < kCounters; ++i) c0[i] = counter + i, c1[i] = address.graph, c3[i] = address.stream;
  philox16(address, c0, c1, c3, words);
}

void words_two_streams(const Address& address, uint32_t other_stream, uint32_t counter, uint32_t* words) {
  uint32_t c0[2 * kCounters], c1[2 * kCounters], c3[2 * kCounters];
  for (int i = 0; i < kCounters; ++i) {
    c0[i] = c0[kCounters + i] = counter + i;
    c1[i] = c1[kCounters + i] = address.graph;
    c3[i] = address.stream, c3[kCounters + i] = other_stream;
  }
  philox32(address, c0, c1, c3, words);
}

void words_scattered(const Address& address, const uint32_t* counters, const uint32_t* lanes, const uint32_t* graphs,
                     uint32_t* words) {
  uint32_t c3[2 * kCounters], all[2 * kLanes];
  std::fill_n(c3, 2 * kCounters, address.stream);
  for (int first = 0; first < kLanes; first += 2 * kCounters) {
    philox32(address, counters + first, graphs + first, c3, all);
    for (int i = 0; i < 2 * kCounters; ++i) words[first + i] = all[4 * i + lanes[first + i]];
  }
}

}  // namespace acgkd
