// Column moments, and the frozen BatchNorm with its rectifier and residual, alone or in one pass over the rows.
//
// A group of lanes walks down rows with the statistics of its columns in registers. Moments: every thread runs
// Welford's update over its rows, and what threads and blocks found is merged pairwise (Chan, Golub and LeVeque 1983)
// in a fixed order, so a large mean costs no digits and equal input gives equal bits.

#include "normalize.h"

namespace acgkd_fast::cuda {
namespace {

template <class W>
struct Moments {
  W count, mean, squares;  // squares: sum of the squared distances to the mean

  __device__ __forceinline__ void merge(W other_count, W other_mean, W other_squares) {
    const W total = count + other_count;
    if (other_count == W(0)) {
      return;
    }
    const W distance = other_mean - mean, share = other_count / total;
    mean += distance * share;
    squares += other_squares + distance * distance * count * share;
    count = total;
  }
};

template <class T>
struct Forward {
  Plan plan;
  int64_t rows;
  int64_t rows_per_block;
  const T* x;
  Statistics<T> norm;
  const T* residual;  // or null
  T* out;
  Wide<T>* mean;
  Wide<T>* variance;
  Wide<T>* block_mean;  // [blocks, width] where there is more than one block, else null
  Wide<T>* block_squares;
};

template <class T>
__device__ __forceinline__ int64_t rows_of_block(const Forward<T>& a, int64_t block) {
  const int64_t left = a.rows - block * a.rows_per_block;
  return left < a.rows_per_block ? left : a.rows_per_block;
}

template <class T>
__device__ __forceinline__ void finish(const Forward<T>& a, int column, Moments<Wide<T>> found) {
  a.mean[column] = found.mean;
  a.variance[column] = a.rows > 0 ? found.squares / static_cast<Wide<T>>(a.rows) : Wide<T>(0);
}

// Merges what the threads of a block found in the columns of one tile. The whole block must take part.
template <class T, bool kVector>
__device__ __forceinline__ void merge_block(const Forward<T>& a, const Lane<T, kVector>& at, int feature, int64_t rows,
                                            Wide<T> count, const Share<T, kVector>& mean,
                                            const Share<T, kVector>& square, unsigned char* shared) {
  using W = Wide<T>;
  W* means = reinterpret_cast<W*>(shared);
  W* squares = reinterpret_cast<W*>(shared + kPartialBytes<T>);
#pragma unroll
  for (int c = 0; c < kElements<T, kVector>; ++c) {
    means[c * kThreads + static_cast<int>(threadIdx.x)] = mean[c];
    squares[c * kThreads + static_cast<int>(threadIdx.x)] = square[c];
  }
  __syncthreads();
  if (at.group == 0) {
#pragma unroll
    for (int c = 0; c < kElements<T, kVector>; ++c) {
      Moments<W> found{count, mean[c], square[c]};
      for (int other = 1; other < at.groups && other < rows; ++other) {
        const int slot = c * kThreads + other * at.lanes + at.lane;
        found.merge(static_cast<W>((rows - other + at.groups - 1) / at.groups), means[slot], squares[slot]);
      }
      const int column = feature + (kVector ? c : c * at.lanes);
      if (column >= a.plan.width) {
        continue;
      }
      if (a.block_mean == nullptr) {
        finish(a, column, found);
      } else {
        const int64_t slot = static_cast<int64_t>(blockIdx.x) * a.plan.width + column;
        a.block_mean[slot] = found.mean;
        a.block_squares[slot] = found.squares;
      }
    }
  }
  __syncthreads();
}

template <class T, bool kVector, bool kMoments, bool kNorm>
__global__ void __launch_bounds__(kThreads, 2) forward_kernel(Forward<T> a) {
  using W = Wide<T>;
  constexpr int K = kElements<T, kVector>;
  ACGKD_FAST_DYNAMIC_SHARED(shared);
  const Lane<T, kVector> at(a.plan);
  const int64_t rows = rows_of_block(a, blockIdx.x);
  const int64_t begin = blockIdx.x * a.rows_per_block * a.plan.width;
  for (int tile = 0; tile < a.plan.tiles; ++tile) {
    const int feature = at.first_feature(tile);
    [[maybe_unused]] const Columns<T, kVector> columns(a.norm, at, kNorm ? feature : a.plan.width);
    Share<T, kVector> mean{}, square{};
    W count = 0;
#pragma unroll 4
    for (int64_t row = at.group; row < rows; row += at.groups) {
      const int64_t offset = begin + row * a.plan.width;
      Share<T, kVector> here;
      at.load(a.x + offset, feature, here);
      if constexpr (kMoments) {
        count += W(1);
        const W share = W(1) / count;
#pragma unroll
        for (int c = 0; c < K; ++c) {
          const W distance = here[c] - mean[c];
          mean[c] += distance * share;
          square[c] += distance * (here[c] - mean[c]);
        }
      }
      if constexpr (kNorm) {
        Share<T, kVector> added{};
        if (a.residual != nullptr) {
          at.load(a.residual + offset, feature, added);
        }
#pragma unroll
        for (int c = 0; c < K; ++c) {
          const W value = columns.normalised(here[c], c);
          // Written so that NaN passes, as it does through torch's relu.
          here[c] = (value <= W(0) ? W(0) : value) + added[c];
        }
        at.store(a.out + offset, feature, here);
      }
    }
    if constexpr (kMoments) {
      merge_block(a, at, feature, rows, count, mean, square, shared);
    }
  }
}

// Merges the blocks: a warp's lanes take 32 neighbouring columns, its 8 warps every eighth block.
template <class T>
__global__ void __launch_bounds__(kThreads) merge_kernel(Forward<T> a, int blocks) {
  using W = Wide<T>;
  ACGKD_FAST_DYNAMIC_SHARED(shared);
  Moments<W>* parts = reinterpret_cast<Moments<W>*>(shared);
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int column = static_cast<int>(blockIdx.x) * kWarp + static_cast<int>(threadIdx.x) % kWarp;
  Moments<W> found{W(0), W(0), W(0)};
  if (column < a.plan.width) {
#pragma unroll 4
    for (int block = warp; block < blocks; block += kWarps) {
      const int64_t slot = static_cast<int64_t>(block) * a.plan.width + column;
      found.merge(static_cast<W>(rows_of_block(a, block)), a.block_mean[slot], a.block_squares[slot]);
    }
  }
  parts[threadIdx.x] = found;
  __syncthreads();
  if (warp == 0 && column < a.plan.width) {
    for (int other = 1; other < kWarps; ++other) {
      const Moments<W> part = parts[other * kWarp + static_cast<int>(threadIdx.x)];
      found.merge(part.count, part.mean, part.squares);
    }
    finish(a, column, found);
  }
}

template <class T>
void run_forward(cudaStream_t stream, const Tensor& x, Forward<T> a) {
  const bool moments = a.mean != nullptr, norm = a.out != nullptr;
  const int64_t width = x.size(1);
  a.rows = x.size(0);
  a.x = read<T>(x);
  if (width == 0 || (a.rows == 0 && !moments)) {
    return;
  }
  const int processors = multiprocessors();
  const bool aligned =
      aligned16({a.x, a.residual, a.out, a.norm.mean, a.norm.variance, a.norm.weight, a.norm.bias});
  a.plan = make_plan<T>(a.rows, 0, width, aligned, processors, false, false);
  const int64_t groups = kThreads >> a.plan.lanes_log2;
  // Blocks of moments are merged by a second launch: at least four rows per group, at most one block per processor.
  const int64_t wanted = moments ? std::min<int64_t>(a.rows / (4 * groups), processors)
                                 : std::min<int64_t>(ceil_div(a.rows, groups), int64_t{4} * processors);
  a.rows_per_block = ceil_div(std::max<int64_t>(1, a.rows), std::max<int64_t>(1, wanted));
  const int64_t blocks = std::max<int64_t>(1, ceil_div(a.rows, a.rows_per_block));
  const bool merges = moments && blocks > 1;
  const Tensor scratch = empty(x, {merges ? 2 * blocks : 0, width}, kWideType<T>);
  if (merges) {
    a.block_mean = write<Wide<T>>(scratch);
    a.block_squares = a.block_mean + blocks * width;
  }
  const size_t shared = moments ? 2 * kPartialBytes<T> : 0;
  with_flags(a.plan.vector, norm, [&](auto vector, auto has_norm) {
    if (moments) {
      launch(stream, forward_kernel<T, vector.value, true, has_norm.value>, blocks, kThreads, shared, a);
    } else if constexpr (has_norm.value) {
      launch(stream, forward_kernel<T, vector.value, false, true>, blocks, kThreads, shared, a);
    }
  });
  if (merges) {
    launch(stream, merge_kernel<T>, ceil_div(width, kWarp), kThreads, kThreads * sizeof(Moments<Wide<T>>), a,
           static_cast<int>(blocks));
  }
}

std::tuple<Tensor, Tensor> column_moments(Tensor x) {
  check_matrix(x);
  const DeviceScope device(x);
  x = dense(x);
  return dispatch_storage(x, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const Tensor mean = empty(x, {x.size(1)}, kWideType<T>), variance = empty(x, {x.size(1)}, kWideType<T>);
    Forward<T> a{};
    a.mean = write<Wide<T>>(mean);
    a.variance = write<Wide<T>>(variance);
    run_forward(device.stream, x, a);
    return std::make_tuple(mean, variance);
  });
}

std::tuple<Tensor, Tensor, Tensor> frozen_norm_relu(Tensor x, OptionalTensor residual, Tensor mean, Tensor variance,
                                                    Tensor weight, Tensor bias, double eps, bool moments) {
  check_matrix(x);
  if (residual) {
    check_like(*residual, x, "residual");
  }
  const DeviceScope device(x);
  x = dense(x), residual = dense(residual);
  const Constants constants(x, mean, variance, weight, bias);
  return dispatch_storage(x, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const int64_t found = moments ? x.size(1) : 0;
    const Tensor out = empty(x, {x.size(0), x.size(1)}, x.scalar_type());
    const Tensor batch_mean = empty(x, {found}, kWideType<T>), batch_variance = empty(x, {found}, kWideType<T>);
    Forward<T> a{};
    a.norm = constants.statistics<T>(eps);
    a.residual = residual ? read<T>(*residual) : nullptr;
    a.out = write<T>(out);
    if (moments) {
      a.mean = write<Wide<T>>(batch_mean);
      a.variance = write<Wide<T>>(batch_variance);
    }
    run_forward(device.stream, x, a);
    return std::make_tuple(out, batch_mean, batch_variance);
  });
}

}  // namespace
}  // namespace acgkd_fast::cuda

STABLE_TORCH_LIBRARY_IMPL(ACGKD_FAST_NAMESPACE, ACGKD_FAST_DISPATCH_KEY, m) {
  m.impl("column_moments", TORCH_BOX(&acgkd_fast::cuda::column_moments));
  m.impl("frozen_norm_relu", TORCH_BOX(&acgkd_fast::cuda::frozen_norm_relu));
}
