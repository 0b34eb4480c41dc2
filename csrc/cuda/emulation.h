// Runs the CUDA kernels of this folder on the host, one block after the other, for tests on machines without a GPU.
//
// Every CUDA thread is a fiber. A fiber runs until it meets a barrier or a warp operation; those complete when all
// threads of the block (the warp) have met the same one, as the hardware demands. What the tests gain: the arithmetic
// of the real kernel sources, a fault when threads meet different barriers or leave others waiting, and, by changing
// the order in which fibers run, other results where a barrier is missing. It models neither caches nor time.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Exception.h>
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

#define ACGKD_FAST_NAMESPACE acgkd_fast_emulation
#define ACGKD_FAST_DISPATCH_KEY CPU
#define ACGKD_FAST_DYNAMIC_SHARED(name) unsigned char* const name = acgkd_fast::emulation::shared_memory()
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0;
constexpr int cudaDevAttrMultiProcessorCount = 0;
constexpr int cudaDevAttrMaxSharedMemoryPerBlockOptin = 1;
constexpr int cudaMemcpyHostToDevice = 1;
constexpr int cudaMemcpyDeviceToHost = 2;
constexpr int cudaFuncAttributeMaxDynamicSharedMemorySize = 0;

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3() = default;
  explicit dim3(unsigned count) : x(count) {}
};

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

struct alignas(16) float4 {
  float x, y, z, w;
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
// The host compiler is not allowed to fuse what stands here.
inline double __dmul_rn(double a, double b) { return a * b; }
template <class V>
V __ldg(const V* from) {
  return *from;
}

namespace acgkd_fast::emulation {

constexpr unsigned kWarpSize = 32;
constexpr size_t kStackBytes = 96 * 1024;
constexpr int kBarrier = 1, kWarpOperation = 2;

struct Fiber {
  ucontext_t start;
  jmp_buf here;
  bool started = false, done = false;
  int waits_for = 0;  // kBarrier, kWarpOperation, or 0 while it can run
  int line = 0;       // source line of what it waits for
  uint64_t given = 0;  // what it brings to the operation
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<unsigned char> shared;
  std::function<void()> body;
  ucontext_t entry;
  jmp_buf scheduler;
  unsigned running = 0;
  uint64_t barrier_result = 0;             // sum of what the threads brought
  std::vector<uint64_t> warp_results;      // what each thread brought to the last operation of its warp
};

inline Block* block = nullptr;
// 0 runs fibers and blocks in order, 1 in reverse, anything else in the shuffled order of that seed.
inline int order_seed = 0;
inline int multiprocessor_count = 4;
// Bytes of shared memory that a block may ask for: those of sm_90.
inline int shared_memory_limit = 227 * 1024;
// Launches since the last reset, for tests of what a call costs.
inline int launches = 0;

// Stacks outlive their block: making 256 of them costs more than running most blocks.
inline unsigned char* stack_of(unsigned index) {
  static std::vector<std::unique_ptr<unsigned char[]>> stacks;
  while (stacks.size() <= index) {
    stacks.emplace_back(new unsigned char[kStackBytes]);
  }
  return stacks[index].get();
}

// vector<unsigned char> is aligned to 16 bytes by the allocator.
inline unsigned char* shared_memory() { return block->shared.data(); }

inline std::vector<unsigned> visiting_order(unsigned first, unsigned count) {
  std::vector<unsigned> order(count);
  std::iota(order.begin(), order.end(), first);
  if (order_seed == 1) {
    std::reverse(order.begin(), order.end());
  } else if (order_seed > 1) {
    std::shuffle(order.begin(), order.end(), std::mt19937(static_cast<unsigned>(order_seed)));
  }
  return order;
}

// Fibers are entered by ucontext and left and resumed by setjmp, which spares the two system calls of swapcontext.
inline void leave(Fiber& self) {
  if (_setjmp(self.here) == 0) {
    _longjmp(block->scheduler, 1);
  }
}

inline void enter() {
  block->body();
  Fiber& self = block->fibers[block->running];
  self.done = true;
  leave(self);
}

inline void resume(unsigned index) {
  Fiber& fiber = block->fibers[index];
  block->running = index;
  threadIdx.x = index;
  if (_setjmp(block->scheduler) != 0) {
    return;
  }
  if (fiber.started) {
    _longjmp(fiber.here, 1);
  }
  fiber.started = true;
  getcontext(&fiber.start);
  fiber.start.uc_stack.ss_sp = stack_of(index);
  fiber.start.uc_stack.ss_size = kStackBytes;
  fiber.start.uc_link = nullptr;
  makecontext(&fiber.start, enter, 0);
  swapcontext(&block->entry, &fiber.start);
}

inline void wait(int kind, int line, uint64_t given) {
  Fiber& self = block->fibers[block->running];
  self.waits_for = kind;
  self.line = line;
  self.given = given;
  leave(self);
}

inline const uint64_t* wait_for_warp(int line, uint64_t given) {
  wait(kWarpOperation, line, given);
  return block->warp_results.data() + threadIdx.x / kWarpSize * kWarpSize;
}

inline uint64_t wait_for_block(int line, uint64_t given) {
  wait(kBarrier, line, given);
  return block->barrier_result;
}

// Completes an operation that fibers first .. last - 1 must meet together. Returns whether it did.
inline bool complete(int kind, unsigned first, unsigned last) {
  Fiber* fibers = block->fibers.data();
  for (unsigned i = first; i < last; ++i) {
    if (fibers[i].waits_for != kind) {
      return false;
    }
  }
  uint64_t sum = 0;
  for (unsigned i = first; i < last; ++i) {
    STD_TORCH_CHECK(fibers[i].line == fibers[first].line, "emulation: threads meet different operations, lines ",
                    fibers[i].line, " and ", fibers[first].line);
    fibers[i].waits_for = 0;
    sum += fibers[i].given;
    if (kind == kWarpOperation) {
      block->warp_results[i] = fibers[i].given;
    }
  }
  if (kind == kBarrier) {
    block->barrier_result = sum;
  }
  return true;
}

// Runs the threads of a warp as far as they get without the rest of the block. Returns whether any of them ran.
inline bool advance(const std::vector<unsigned>& lanes, unsigned first, unsigned last) {
  bool progress = false;
  do {
    for (unsigned index : lanes) {
      Fiber& fiber = block->fibers[index];
      if (!fiber.done && fiber.waits_for == 0) {
        resume(index);
        progress = true;
      }
    }
  } while (complete(kWarpOperation, first, last));
  return progress;
}

inline void run_block(unsigned threads, size_t shared_bytes, const std::function<void()>& body) {
  Block here;
  // NaN in every floating-point type, so that reading what nobody wrote shows.
  here.shared.assign(shared_bytes, 0xff);
  here.body = body;
  here.fibers.resize(threads);
  here.warp_results.resize(threads);
  block = &here;
  const unsigned warp_count = (threads + kWarpSize - 1) / kWarpSize;
  const std::vector<unsigned> warps = visiting_order(0, warp_count);
  std::vector<std::vector<unsigned>> lanes;
  for (unsigned warp = 0; warp < warp_count; ++warp) {
    lanes.push_back(visiting_order(warp * kWarpSize, std::min(kWarpSize, threads - warp * kWarpSize)));
  }
  const auto all_done = [&] {
    return std::all_of(here.fibers.begin(), here.fibers.end(), [](const Fiber& fiber) { return fiber.done; });
  };
  while (!all_done()) {
    bool progress = false;
    for (unsigned warp : warps) {
      progress |= advance(lanes[warp], warp * kWarpSize, std::min((warp + 1) * kWarpSize, threads));
    }
    progress |= complete(kBarrier, 0, threads);
    STD_TORCH_CHECK(progress, "emulation: threads wait for others that left or wait elsewhere");
  }
  block = nullptr;
}

inline void run(const cudaLaunchConfig_t& config, const std::function<void()>& body) {
  ++launches;
  gridDim = config.gridDim;
  blockDim = config.blockDim;
  for (unsigned index : visiting_order(0, config.gridDim.x)) {
    blockIdx.x = index;
    run_block(config.blockDim.x, config.dynamicSmemBytes, body);
  }
}

template <class V>
uint64_t to_bits(V value) {
  static_assert(sizeof(V) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(V));
  return bits;
}

template <class V>
V from_bits(uint64_t bits) {
  V value;
  std::memcpy(&value, &bits, sizeof(V));
  return value;
}

template <class V, class Pick>
V reduce_warp(V value, Pick pick, int line) {
  const uint64_t* all = wait_for_warp(line, to_bits(value));
  V result = from_bits<V>(all[0]);
  for (unsigned lane = 1; lane < kWarpSize; ++lane) {
    result = pick(result, from_bits<V>(all[lane]));
  }
  return result;
}

}  // namespace acgkd_fast::emulation

// For ctypes: how the next kernels run. Returns the launches since the last call.
extern "C" __attribute__((used, visibility("default"))) inline int acgkd_fast_emulate(int order, int processors) {
  namespace e = acgkd_fast::emulation;
  e::order_seed = order;
  e::multiprocessor_count = processors;
  return std::exchange(e::launches, 0);
}

extern "C" __attribute__((used, visibility("default"))) inline void acgkd_fast_emulate_shared(int bytes) {
  acgkd_fast::emulation::shared_memory_limit = bytes;
}

inline void __syncthreads(int line = __builtin_LINE()) { acgkd_fast::emulation::wait_for_block(line, 0); }

inline int __syncthreads_or(int predicate, int line = __builtin_LINE()) {
  return acgkd_fast::emulation::wait_for_block(line, predicate != 0) != 0;
}

inline int __syncthreads_count(int predicate, int line = __builtin_LINE()) {
  return static_cast<int>(acgkd_fast::emulation::wait_for_block(line, predicate != 0));
}

inline void __syncwarp(int line = __builtin_LINE()) { acgkd_fast::emulation::wait_for_warp(line, 0); }

inline unsigned __ballot_sync(unsigned, int predicate, int line = __builtin_LINE()) {
  const uint64_t* all = acgkd_fast::emulation::wait_for_warp(line, predicate != 0);
  unsigned set = 0;
  for (unsigned lane = 0; lane < acgkd_fast::emulation::kWarpSize; ++lane) {
    set |= static_cast<unsigned>(all[lane]) << lane;
  }
  return set;
}

template <class V>
V __shfl_sync(unsigned, V value, int lane, int line = __builtin_LINE()) {
  namespace e = acgkd_fast::emulation;
  return e::from_bits<V>(e::wait_for_warp(line, e::to_bits(value))[lane]);
}

// The kernels use the full mask only; a lane that is missing is a fault that run_block reports.
template <class V>
V __shfl_xor_sync(unsigned, V value, int offset, int line = __builtin_LINE()) {
  namespace e = acgkd_fast::emulation;
  const unsigned lane = threadIdx.x % e::kWarpSize;
  return e::from_bits<V>(e::wait_for_warp(line, e::to_bits(value))[lane ^ offset]);
}

template <class V>
V __reduce_max_sync(unsigned, V value, int line = __builtin_LINE()) {
  return acgkd_fast::emulation::reduce_warp(value, [](V a, V b) { return std::max(a, b); }, line);
}

template <class V>
V __reduce_min_sync(unsigned, V value, int line = __builtin_LINE()) {
  return acgkd_fast::emulation::reduce_warp(value, [](V a, V b) { return std::min(a, b); }, line);
}

inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0; }
inline cudaError_t cudaDeviceGetAttribute(int* value, int attribute, int) {
  namespace e = acgkd_fast::emulation;
  *value = attribute == cudaDevAttrMultiProcessorCount ? e::multiprocessor_count : e::shared_memory_limit;
  return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, int, cudaStream_t) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaFuncSetAttribute(const void*, int, int) { return cudaSuccess; }

template <class... Params, class... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...), const Args&... args) {
  acgkd_fast::emulation::run(*config, [&] { kernel(args...); });
  return cudaSuccess;
}
