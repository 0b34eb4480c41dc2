// Graph attention, forward; see attention.h.

#include "attention.h"

namespace acgkd_fast::cuda {
namespace {

template <class T>
struct Forward : Attention<T> {
  T* out;
  Wide<T>* highest;
  Wide<T>* total;
};

template <class T>
__global__ void __launch_bounds__(kThreads, 2) forward_kernel(Forward<T> a) {
  using W = Wide<T>;
  constexpr W kNone = -static_cast<W>(INFINITY);
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (at >= a.nodes * a.heads) {
    return;
  }
  const int head = static_cast<int>(at % a.heads);
  const Span span = row_span(a.rowptr, at / a.heads);
  const auto sender = [&](unsigned k) { return static_cast<int64_t>(a.entries.col[span.begin + k]) * a.heads + head; };
  const W own_score = a.score(at, at);
  W present = a.loops ? own_score : kNone;
  W any = present;
  for (unsigned k = lane; k < span.length; k += kWarp) {
    const W score = a.score(at, sender(k));
    any = score > any ? score : any;
    present = a.entries.template value_of<false>(span.begin + k) != 0 && score > present ? score : present;
  }
  present = warp_max(present), any = warp_max(any);
  const W highest = present != kNone ? present : any != kNone ? any : W(0);
  const auto weigh = [&](int64_t entry, int64_t from) {
    return a.entries.template value_of<false>(entry) * share(a.score(at, from), highest);
  };
  const W own = a.loops ? share(own_score, highest) : W(0);
  W total = 0;
  for (unsigned k = lane; k < span.length; k += kWarp) {
    total += weigh(span.begin + k, sender(k));
  }
  total = group_sum(total, kWarp) + own;
  // Where nothing is, an edge of weight 1 would have all the attention: its slope there is that step.
  total = total == 0 ? W(1) : total;
  if (lane == 0) {
    a.highest[at] = highest;
    a.total[at] = total;
  }
  weigh_rows<T>(a.sent, a.entries.col, span, a, at, own, total, weigh, a.out);
}

std::tuple<Tensor, Tensor, Tensor> gat_propagate(Tensor sent, Tensor source, Tensor target, Tensor value, Tensor rowptr,
                                                 Tensor col, OptionalTensor /*t_rowptr*/, OptionalTensor /*t_col*/,
                                                 OptionalTensor /*t_edge*/, double negative_slope,
                                                 bool add_self_loops) {
  check_operands(sent, value, rowptr, col, "sent");
  check_scores(sent, source, target);
  const DeviceScope device(sent);
  sent = dense(sent), source = dense(source), target = dense(target);
  value = dense(value), rowptr = dense(rowptr), col = dense(col);
  return dispatch_storage(sent, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const Tensor out = empty(sent, {sent.size(0), sent.size(1)}, sent.scalar_type());
    const Tensor highest = empty(sent, {source.size(0), source.size(1)}, kWideType<T>);
    const Tensor total = empty(sent, {source.size(0), source.size(1)}, kWideType<T>);
    const Forward<T> a{attention_arguments<T>(sent, source, target, value, rowptr, col, negative_slope, add_self_loops),
                       write<T>(out), write<Wide<T>>(highest), write<Wide<T>>(total)};
    if (a.nodes > 0) {
      launch(device.stream, forward_kernel<T>, ceil_div(a.nodes * a.heads, kWarps), kThreads, 0, a);
    }
    return std::make_tuple(out, highest, total);
  });
}

}  // namespace
}  // namespace acgkd_fast::cuda

STABLE_TORCH_LIBRARY_IMPL(ACGKD_FAST_NAMESPACE, ACGKD_FAST_DISPATCH_KEY, m) {
  m.impl("gat_propagate", TORCH_BOX(&acgkd_fast::cuda::gat_propagate));
}
