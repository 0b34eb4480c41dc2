// Philox for 16 counters at a time. Compilers turn its 32 x 32 -> 64 bit products into several full ones, or into
// shuffles of half-filled vectors, which costs twice the time; the two instruction sets that matter are spelt out.
#include "cpu/blocks.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>
#endif

namespace acgkd {
namespace {

constexpr int kCounters = kLanes / 4;

// Counters c0[i], c1[i], step, stream; words[4 i + lane].
using Philox = void (*)(const Address&, const uint32_t* c0, const uint32_t* c1, uint32_t* words);

void philox_portable(const Address& address, const uint32_t* c0, const uint32_t* c1, uint32_t* words) {
  uint32_t out[4][kCounters];
  for (int i = 0; i < kCounters; ++i) {
    uint32_t w0 = c0[i], w1 = c1[i], w2 = address.step, w3 = address.stream;
    philox(w0, w1, w2, w3, address.key);
    out[0][i] = w0, out[1][i] = w1, out[2][i] = w2, out[3][i] = w3;
  }
  for (int i = 0; i < kCounters; ++i) {
    for (int lane = 0; lane < 4; ++lane) words[4 * i + lane] = out[lane][i];
  }
}

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)

// Each 64-bit lane holds one 32-bit word below bits that nobody reads: products use the low half only.
// A macro, as neither templates nor lambdas take the instruction set of the function around them.
#define ACGKD_PHILOX(name, isa, width, Register, multiply)                                                        \
  __attribute__((target(isa))) void name(const Address& address, const uint32_t* c0, const uint32_t* c1,           \
                                         uint32_t* words) {                                                        \
    typedef uint64_t Lanes __attribute__((vector_size(8 * width)));                                                \
    typedef uint32_t Words __attribute__((vector_size(4 * width)));                                                \
    constexpr int kGroups = kCounters / width;                                                                     \
    const Lanes first = Lanes{} + kMultiplier0, second = Lanes{} + kMultiplier1, low = Lanes{} + 0xFFFFFFFFu;      \
    Lanes w0[kGroups], w1[kGroups], w2[kGroups], w3[kGroups];                                                      \
    for (int g = 0; g < kGroups; ++g) {                                                                            \
      Words a, b;                                                                                                  \
      std::memcpy(&a, c0 + g * width, sizeof a);                                                                   \
      std::memcpy(&b, c1 + g * width, sizeof b);                                                                   \
      w0[g] = __builtin_convertvector(a, Lanes);                                                                   \
      w1[g] = __builtin_convertvector(b, Lanes);                                                                   \
      w2[g] = Lanes{} + address.step;                                                                              \
      w3[g] = Lanes{} + address.stream;                                                                            \
    }                                                                                                              \
    Key key = address.key;                                                                                         \
    for (int round = 0; round < kPhiloxRounds; ++round, advance(key)) {                                            \
      for (int g = 0; g < kGroups; ++g) {                                                                          \
        const Lanes product0 = (Lanes)multiply((Register)w0[g], (Register)first);                                  \
        const Lanes product1 = (Lanes)multiply((Register)w2[g], (Register)second);                                 \
        w0[g] = (product1 >> 32) ^ w1[g] ^ (Lanes{} + key.low);                                                    \
        w2[g] = (product0 >> 32) ^ w3[g] ^ (Lanes{} + key.high);                                                   \
        w1[g] = product1;                                                                                          \
        w3[g] = product0;                                                                                          \
      }                                                                                                            \
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

ACGKD_PHILOX(philox_avx512, "avx512f,avx512vl,avx512dq", 8, __m512i, ACGKD_MULTIPLY512)
ACGKD_PHILOX(philox_avx2, "avx2", 4, __m256i, _mm256_mul_epu32)

Philox choose() {
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
    return philox_avx512;
  }
  return __builtin_cpu_supports("avx2") ? philox_avx2 : philox_portable;
}

const Philox philox16 = choose();

#else

constexpr Philox philox16 = philox_portable;

#endif

}  // namespace

void words_block(const Address& address, uint32_t counter, uint32_t* words) {
  uint32_t c0[kCounters], c1[kCounters];
  for (int i = 0; i < kCounters; ++i) c0[i] = counter + i, c1[i] = address.graph;
  philox16(address, c0, c1, words);
}

void words_scattered(const Address& address, const uint32_t* counters, const uint32_t* lanes, const uint32_t* graphs,
                     uint32_t* words) {
  for (int first = 0; first < kLanes; first += kCounters) {
    uint32_t all[kLanes];
    philox16(address, counters + first, graphs + first, all);
    for (int i = 0; i < kCounters; ++i) words[first + i] = all[4 * i + lanes[first + i]];
  }
}

}  // namespace acgkd
