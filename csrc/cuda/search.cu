// Many steps of the search over hard graphs in one call. Not yet run on a GPU.
//
// The host reads once, before the first round: sizes, step and whether the operands make sense. All rounds are then
// enqueued, two to four launches each; a search that ends early empties the remaining ones.

#include <algorithm>
#include <sstream>
#include <string>
#include <vector>

#include "../layout.h"
#include "search.h"

namespace acgkd_fast::cuda::search {
namespace {

constexpr int64_t kAny = -1;

void check_operand(const char* name, const Tensor& tensor, ScalarType dtype, std::initializer_list<int64_t> shape,
                   const Tensor& like) {
  const bool here = tensor.get_device_index() == like.get_device_index() && tensor.is_contiguous();
  bool fits = here && tensor.scalar_type() == dtype && tensor.dim() == static_cast<int64_t>(shape.size());
  std::ostringstream wanted;
  int64_t d = 0;
  for (const int64_t extent : shape) {
    fits = fits && (extent == kAny || tensor.size(d) == extent);
    wanted << (d++ ? ", " : "") << (extent == kAny ? "any" : std::to_string(extent));
  }
  STD_TORCH_CHECK(fits, "search_steps: ", name, ": expected a contiguous ", torch::headeronly::toString(dtype),
                  " tensor of shape (", wanted.str(), ") on the device of x");
}

// Where the host finds what it reads.
constexpr int64_t kSeed = 0, kFirstStep = 1, kFirstOffset = 2;

// A block per graph: copies what the host wants to know of it and says whether it is sound.
struct Facts {
  const int64_t *rng, *ptr, *y, *label, *pairs, *counts, *table;  // table: null without weights
  int64_t graphs, nodes, classes, capacity, steps, num_labels, kind, num_pairs;
  int64_t* out;  // seed, first step, [graphs + 1] node offsets, [graphs] faults
};

constexpr int64_t kBadTarget = 1, kBadLabel = 2, kBadGraph = 4, kBadTable = 8;

__global__ void __launch_bounds__(kThreads, 2) facts_kernel(Facts a) {
  const int64_t graph = blockIdx.x, begin = a.ptr[graph], end = a.ptr[graph + 1], count = a.counts[graph];
  const bool sized = begin >= 0 && begin < end && end <= a.nodes && (graph > 0 || begin == 0) &&
                     (graph + 1 < a.graphs || end == a.nodes);
  bool listed = sized && count >= 0 && count + a.steps <= a.capacity, labelled = true;
  for (int64_t e = threadIdx.x; listed && e < count; e += kThreads) {
    const int64_t pair = a.pairs[graph * a.capacity + e], low = pair >> 32, high = pair & 0xffffffff;
    listed = low >= 0 && low < high && high < end - begin;
  }
  for (int64_t node = begin + threadIdx.x; sized && a.num_labels > 1 && node < end; node += kThreads) {
    labelled = labelled && a.label[node] >= 0 && a.label[node] < a.num_labels;
  }
  const bool bad_list = __syncthreads_or(!listed), bad_label = __syncthreads_or(!labelled);
  if (threadIdx.x != 0) {
    return;
  }
  const bool bad_target = a.y[graph] < 0 || a.y[graph] >= a.classes;
  bool bad_table = false;
  if (a.table != nullptr) {
    const acgkd::GraphLayout layout = acgkd::graph_layout(a.table, a.graphs, graph);
    bad_table = layout.first_node != begin || layout.num_nodes != end - begin || layout.band < 0 ||
                (graph == 0 && layout.first_pair != 0) || layout.first_pair < 0 ||
                layout.num_pairs != acgkd::count_pairs(layout.num_nodes, layout.band, a.kind) ||
                (graph + 1 == a.graphs && layout.first_pair + layout.num_pairs != a.num_pairs);
  }
  a.out[kFirstOffset + a.graphs + 1 + graph] = (bad_target ? kBadTarget : 0) | (bad_label ? kBadLabel : 0) |
                                               (bad_list ? kBadGraph : 0) | (bad_table ? kBadTable : 0);
  a.out[kFirstOffset + graph] = begin;
  if (graph == 0) {
    a.out[kSeed] = a.rng[0];
    a.out[kFirstStep] = a.rng[1];
    a.out[kFirstOffset + a.graphs] = a.ptr[a.graphs];
  }
}

std::vector<int64_t> read_facts(cudaStream_t stream, const Facts& facts, const Tensor& out) {
  launch(stream, facts_kernel, facts.graphs, kThreads, 0, facts);
  std::vector<int64_t> found(out.numel());
  check(cudaMemcpyAsync(found.data(), read<int64_t>(out), found.size() * sizeof(int64_t), cudaMemcpyDeviceToHost,
                        stream),
        "reading the sizes of the graphs");
  check(cudaStreamSynchronize(stream), "reading the sizes of the graphs");
  int64_t faults = 0;
  for (int64_t g = 0; g < facts.graphs; ++g) {
    faults |= found[kFirstOffset + facts.graphs + 1 + g];
  }
  STD_TORCH_CHECK(!(faults & kBadTarget), "search_steps: y: expected values in 0..", facts.classes - 1);
  STD_TORCH_CHECK(!(faults & kBadGraph),
                  "search_steps: ptr, pairs, counts: expected graphs of 1 node or more, edges low < high inside them, "
                  "and room for one more edge per step, got others");
  STD_TORCH_CHECK(!(faults & kBadTable), "search_steps: table: expected a layout of the graphs of ptr, got another");
  STD_TORCH_CHECK(!(faults & kBadLabel), "search_steps: label: expected values in 0..", facts.num_labels - 1);
  return found;
}

// Begins of the rounds, and the end of the last, in steps of this call; see Search::run in csrc/cpu/search.cpp.
std::vector<int32_t> round_begins(int64_t first, int64_t steps, int64_t interval, bool checked) {
  std::vector<int32_t> begins{0};
  for (int64_t step = first; step < first + steps;) {
    int64_t stop = std::min(first + steps, (step / interval + 1) * interval);
    if (checked) {
      stop = std::min(stop, (step / kCheckEvery + 1) * kCheckEvery);
    }
    begins.push_back(static_cast<int32_t>(stop - first));
    step = stop;
  }
  return begins;
}

int64_t shared_memory_limit() {
  int device = 0, bytes = 0;
  check(cudaGetDevice(&device), "reading the current device");
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "reading shared memory");
  return bytes;
}

template <class V>
Tensor uploaded(cudaStream_t stream, const Tensor& like, const std::vector<V>& values, ScalarType dtype) {
  const Tensor to = empty(like, {static_cast<int64_t>(values.size())}, dtype);
  check(cudaMemcpyAsync(write<V>(to), values.data(), values.size() * sizeof(V), cudaMemcpyHostToDevice, stream),
        "writing the plan of a search");
  return to;
}

Network make_network(const Tensor& parameters, bool gin, int64_t depth, int64_t features, int64_t width,
                     int64_t classes, int64_t readout) {
  STD_TORCH_CHECK(depth >= 1 && features >= 1 && width >= 1 && classes >= 1 && readout >= 0 && readout <= 2,
                  "search_steps: expected depth, features, width and classes of 1 or more and a readout 0..2, got ",
                  depth, ", ", features, ", ", width, ", ", classes, " and ", readout);
  const int64_t affine = 2 * width, square = width * width + width;
  const int64_t block = gin ? 1 + 2 * affine + square : affine;
  const int64_t inputs = features + (depth - 1) * width, head = classes * (width + 1);
  check_operand("parameters", parameters, ScalarType::Float,
                {inputs * width + depth * (width + block) + head}, parameters);
  Network net{};
  net.classifier = read<float>(parameters) + parameters.numel() - head;
  net.bias = net.classifier + classes * width;
  net.depth = static_cast<int>(depth);
  net.features = static_cast<int>(features);
  net.width = static_cast<int>(width);
  net.stride = static_cast<int>(rounded_up(width, kTile));
  net.classes = static_cast<int>(classes);
  net.pooling = static_cast<int>(readout);
  net.gin = gin;
  return net;
}

using Result = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Result search_steps(Tensor pairs, Tensor counts, Tensor label, Tensor sums, Tensor loss, Tensor hit, Tensor total,
                    Tensor level, Tensor x, Tensor y, Tensor ptr, Tensor ids, Tensor parameters, Tensor running,
                    Tensor rng, bool gin, int64_t depth, int64_t width, int64_t classes, int64_t readout,
                    int64_t steps, int64_t interval, int64_t edited, int64_t num_labels, double below_relabel,
                    double below_rewire, double below_add, double lam_k, double w_ce, double cap, double temperature,
                    double stop_k, int64_t min_steps, int64_t proposals, double two_hop, bool keep_degrees,
                    bool connected, int64_t max_degree, OptionalTensor weight, OptionalTensor cumulative,
                    OptionalTensor table, int64_t kind) {
  check_operand("x", x, ScalarType::Float, {kAny, kAny}, x);
  const int64_t nodes = x.size(0), features = x.size(1);
  Network net = make_network(parameters, gin, depth, features, width, classes, readout);
  check_operand("y", y, ScalarType::Long, {kAny}, x);
  const int64_t graphs = y.size(0), channels = net.channels();
  check_operand("parameters", parameters, ScalarType::Float, {kAny}, x);
  check_operand("pairs", pairs, ScalarType::Long, {graphs, kAny}, x);
  check_operand("counts", counts, ScalarType::Long, {graphs}, x);
  check_operand("label", label, ScalarType::Long, {nodes}, x);
  check_operand("sums", sums, ScalarType::Double, {graphs, 2, channels}, x);
  check_operand("loss", loss, ScalarType::Double, {graphs}, x);
  check_operand("hit", hit, ScalarType::Bool, {graphs}, x);
  check_operand("total", total, ScalarType::Double, {2, channels}, x);
  check_operand("level", level, ScalarType::Double, {2}, x);
  check_operand("ptr", ptr, ScalarType::Long, {graphs + 1}, x);
  check_operand("ids", ids, ScalarType::Long, {graphs}, x);
  check_operand("running", running, ScalarType::Double, {3, channels}, x);
  check_operand("rng", rng, ScalarType::Long, {2}, x);
  STD_TORCH_CHECK(steps >= 0 && steps < INT32_MAX && interval >= 1 && edited >= 1 && edited <= graphs,
                  "search_steps: expected steps of 0 or more, an interval of 1 or more and 1..", graphs,
                  " graphs edited at a time, got ", steps, ", ", interval, " and ", edited);
  STD_TORCH_CHECK(num_labels <= 1 || num_labels == features, "search_steps: num_labels: expected 0, 1 or ", features,
                  ", got ", num_labels);
  STD_TORCH_CHECK(proposals >= 1 && proposals < INT32_MAX && (proposals == 1 || temperature == 0.0),
                  "search_steps: proposals: expected 1 or more, and 1 with a temperature, got ", proposals);
  if (weight) {
    STD_TORCH_CHECK(cumulative && table && !(kind & acgkd::kDirected),
                    "search_steps: weight: expected cumulative sums and an undirected layout with it, got others");
    check_operand("weight", *weight, ScalarType::Double, {kAny}, x);
    check_operand("cumulative", *cumulative, ScalarType::Double, {weight->numel() + 1}, x);
    check_operand("table", *table, ScalarType::Long, {4, graphs + 1}, x);
  }
  const DeviceScope device(x);
  const cudaStream_t stream = device.stream;

  const Tensor facts_out = empty(x, {kFirstOffset + 2 * graphs + 1}, ScalarType::Long);
  const std::vector<int64_t> facts = read_facts(
      stream,
      {read<int64_t>(rng), read<int64_t>(ptr), read<int64_t>(y), read<int64_t>(label), read<int64_t>(pairs),
       read<int64_t>(counts), weight ? read<int64_t>(*table) : nullptr, graphs, nodes, classes, pairs.size(1), steps,
       num_labels, kind, weight ? weight->numel() : 0, write<int64_t>(facts_out)},
      facts_out);

  Job job{};
  const int64_t limit = shared_memory_limit();
  STD_TORCH_CHECK(fixed_bytes(net) <= limit, "search_steps: expected a teacher whose moment sums and logits take ",
                  limit, " bytes of shared memory or fewer, got ", fixed_bytes(net));
  std::vector<int64_t> state_start(graphs), scratch_start(graphs);
  int64_t state_size = 0, scratch_size = 0, shared = fixed_bytes(net);
  for (int64_t g = 0; g < graphs; ++g) {
    const int64_t n = facts[kFirstOffset + g + 1] - facts[kFirstOffset + g];
    state_start[g] = state_size;
    scratch_start[g] = scratch_size;
    state_size += state_words(net, n);
    STD_TORCH_CHECK(state_words(net, n) < INT32_MAX && pairs.size(1) < INT32_MAX,
                    "search_steps: expected graphs whose state has fewer than 2^31 words, got one of ", n, " nodes");
    const int64_t bytes = shared_bytes(net, n);
    if (bytes <= limit) {
      shared = std::max(shared, bytes);
      job.some_fit = true;
    } else {
      scratch_size += scratch_words(net, n);
      job.some_do_not = true;
    }
  }
  job.shared_limit = static_cast<int>(shared);

  const std::vector<int32_t> begins = round_begins(facts[kFirstStep], steps, interval, stop_k > 0);
  const int rounds = static_cast<int>(begins.size()) - 1;
  const auto scratch_of = [&](int64_t count, ScalarType dtype) { return empty(x, {count}, dtype); };
  const Tensor starts = uploaded(stream, x, state_start, ScalarType::Long);
  const Tensor scratch_starts = uploaded(stream, x, scratch_start, ScalarType::Long);
  const Tensor begins_there = uploaded(stream, x, begins, ScalarType::Int);
  const Tensor weights = scratch_of(net.block_start(net.depth), ScalarType::Float);
  const Tensor self_weight = scratch_of(net.depth, ScalarType::Float);
  const Tensor state = scratch_of(2 * state_size, ScalarType::Float);
  const Tensor scratch = scratch_of(scratch_size, ScalarType::Float);
  const Tensor records = scratch_of(graphs * static_cast<int64_t>(sizeof(Record)) / 8, ScalarType::Double);
  const Tensor other_pairs = empty(x, {graphs, pairs.size(1)}, ScalarType::Long);
  const Tensor other_sums = empty(x, {graphs, 2, channels}, ScalarType::Double);
  const Tensor change = scratch_of(graphs * net.sums(), ScalarType::Double);
  const Tensor picked = scratch_of(steps * graphs, ScalarType::Byte);
  const Tensor list = scratch_of(rounds * graphs, ScalarType::Int);
  const Tensor list_count = scratch_of(rounds, ScalarType::Int);
  const Tensor slope = scratch_of(net.sums(), ScalarType::Double);
  const Tensor survives = scratch_of(graphs + 1, ScalarType::Int);
  const Tensor candidate = scratch_of(32 * (2 * channels + 1), ScalarType::Double);
  Result result{torch::stable::empty_like(pairs), torch::stable::empty_like(counts), torch::stable::clone(label),
                torch::stable::empty_like(sums),  torch::stable::empty_like(loss),   torch::stable::empty_like(hit),
                torch::stable::empty_like(total), torch::stable::empty_like(level),
                empty(x, {steps}, ScalarType::Double), empty(x, {2}, ScalarType::Long)};
  auto& [new_pairs, new_counts, new_label, new_sums, new_loss, new_hit, new_total, new_level, trace, progress] = result;

  net.weights = write<float>(weights);
  net.self_weight = write<float>(self_weight);
  job.net = net;
  job.energy = {read<double>(running), static_cast<double>(nodes), lam_k, w_ce / static_cast<double>(graphs), cap};
  job.rules = {below_relabel,
               below_rewire,
               below_add,
               two_hop,
               static_cast<int>(num_labels),
               static_cast<int>(std::min<int64_t>(max_degree, INT32_MAX)),
               static_cast<int>(proposals),
               keep_degrees,
               connected,
               weight ? read<double>(*weight) : nullptr,
               weight ? read<double>(*cumulative) : nullptr,
               weight ? read<int64_t>(*table) : nullptr,
               kind};
  job.pool = {static_cast<int>(graphs),
              pairs.size(1),
              state_size,
              read<int64_t>(ptr),
              read<int64_t>(y),
              read<int64_t>(ids),
              read<int64_t>(starts),
              read<int64_t>(scratch_starts),
              read<float>(x),
              write<float>(state),
              write<float>(scratch),
              {write<int64_t>(new_pairs), write<int64_t>(other_pairs)},
              {write<double>(new_sums), write<double>(other_sums)},
              write<double>(change),
              static_cast<Record*>(records.mutable_data_ptr())};
  job.rounds = {read<int32_t>(begins_there), write<unsigned char>(picked), write<int32_t>(list),
                write<int32_t>(list_count)};
  job.key = acgkd::key_of(facts[kSeed]);
  job.first_step = facts[kFirstStep];
  job.min_steps = min_steps;
  job.steps = static_cast<int>(steps);
  job.edited = static_cast<int>(edited);
  job.temperature = temperature;
  job.stop_k = stop_k;
  job.slope = write<double>(slope);
  job.total = write<double>(new_total);
  job.level = write<double>(new_level);
  job.trace = write<double>(trace);
  job.progress = write<int64_t>(progress);
  job.survives = write<int32_t>(survives);
  job.stopped = job.survives + graphs;
  job.candidate = write<double>(candidate);

  launch_pad(stream, net, read<float>(parameters), write<float>(weights), write<float>(self_weight));
  launch_start(stream, job, read<double>(total), read<double>(level));
  launch_build(stream, job, read<int64_t>(counts), read<int64_t>(label), read<double>(loss), read<bool>(hit),
               read<double>(sums), read<int64_t>(pairs));
  if (rounds > 0) {
    launch_choose(stream, job, rounds);
  }
  for (int round = 0; round < rounds; ++round) {
    const int64_t most = std::min<int64_t>(graphs, edited * (begins[round + 1] - begins[round]));
    launch_edit(stream, job, round, most);
    launch_settle(stream, job, round, most);
  }
  launch_finish(stream, job, write<int64_t>(new_counts), num_labels > 1 ? write<int64_t>(new_label) : nullptr,
                write<double>(new_loss), write<bool>(new_hit));
  return result;
}

}  // namespace
}  // namespace acgkd_fast::cuda::search

STABLE_TORCH_LIBRARY_IMPL(ACGKD_FAST_NAMESPACE, ACGKD_FAST_DISPATCH_KEY, m) {
  m.impl("search_steps", TORCH_BOX(&acgkd_fast::cuda::search::search_steps));
}
