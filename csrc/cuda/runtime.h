// Host side shared by the CUDA kernels: device, stream, launches and checks, on the libtorch stable ABI.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

#ifdef ACGKD_FAST_EMULATION
#include "emulation.h"
#else
#include <cuda_runtime.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#define ACGKD_FAST_NAMESPACE acgkd_fast
#define ACGKD_FAST_DISPATCH_KEY CUDA
#define ACGKD_FAST_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#endif

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>

namespace acgkd_fast::cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline void check(cudaError_t status, const char* action) {
  if (status == cudaSuccess) {
    return;
  }
  // Otherwise the runtime keeps the error and the next, innocent caller is blamed for it.
  cudaGetLastError();
  STD_TORCH_CHECK(false, "acgkd_fast: ", action, ": ", cudaGetErrorString(status));
}

#ifdef ACGKD_FAST_EMULATION
struct DeviceScope {
  explicit DeviceScope(const Tensor&) {}
  cudaStream_t stream = nullptr;
};
#else
// The shim is looked up in the torch that is running, so that one library loads with and without CUDA in torch, and
// builds against either.
inline cudaStream_t current_stream(int32_t device) {
  using Shim = AOTITorchError (*)(int32_t, void**);
  static const Shim shim = [] {
    void* torch_cuda = dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_NOLOAD);
    void* found = dlsym(torch_cuda != nullptr ? torch_cuda : RTLD_DEFAULT, "aoti_torch_get_current_cuda_stream");
    return reinterpret_cast<Shim>(found);
  }();
  STD_TORCH_CHECK(shim != nullptr, "acgkd_fast: CUDA tensors, but this torch exports no CUDA stream shim");
  void* stream = nullptr;
  STD_TORCH_CHECK(shim(device, &stream) == 0, "acgkd_fast: torch gave no current stream for device ", device);
  return static_cast<cudaStream_t>(stream);
}

// Selects the device of a tensor for the life of the object.
struct DeviceScope {
  explicit DeviceScope(const Tensor& tensor)
      : guard(tensor.get_device_index()), stream(current_stream(tensor.get_device_index())) {}
  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream;
};
#endif

inline int multiprocessors() {
  int device = 0, count = 0;
  check(cudaGetDevice(&device), "reading the current device");
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "reading the multiprocessor count");
  return count;
}

template <class... Params, class... Args>
void launch(cudaStream_t stream, void (*kernel)(Params...), int64_t blocks, int threads, size_t shared_bytes,
            const Args&... args) {
  constexpr size_t kWithoutOptIn = 48 * 1024;
  if (shared_bytes > kWithoutOptIn) {
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(shared_bytes)),
          "asking for shared memory");
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  check(cudaLaunchKernelEx(&config, kernel, args...), "launching a kernel");
}

template <class T>
struct TypeTag {
  using type = T;
};

// Calls body(TypeTag<T>{}) for the storage type of x.
template <class Body>
auto dispatch_storage(const Tensor& x, Body body) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return body(TypeTag<float>{});
    case ScalarType::Double:
      return body(TypeTag<double>{});
    default:
      STD_TORCH_CHECK(x.scalar_type() == ScalarType::BFloat16,
                      "x: expected float32, float64 or bfloat16, got another dtype");
      return body(TypeTag<c10::BFloat16>{});
  }
}

template <class T>
const T* read(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <class T>
T* write(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

inline Tensor dense(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

inline OptionalTensor dense(const OptionalTensor& tensor) {
  return tensor ? OptionalTensor(dense(*tensor)) : tensor;
}

inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType dtype) {
  return torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(shape.begin(), shape.size()), dtype);
}

inline bool aligned16(std::initializer_list<const void*> pointers) {
  uintptr_t bits = 0;
  for (const void* pointer : pointers) {
    bits |= reinterpret_cast<uintptr_t>(pointer);
  }
  return bits % 16 == 0;
}

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace acgkd_fast::cuda
