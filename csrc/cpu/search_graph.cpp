#include "cpu/search_graph.h"

#include <algorithm>
#include <cmath>
#include <cstring>


namespace acgkd {
namespace {

// A share of a core's second level cache, 1 MiB and more on current servers.
constexpr int64_t kPrefetchedBytes = 1 << 18;

// `kLocality` 3 asks for the first level cache, 2 for the second.
template <int kLocality>
void fetch_row(const float* row, int64_t stride) {
  for (int64_t k = 0; k < stride; k += kTile) __builtin_prefetch(row + k, 0, kLocality);
}

}  // namespace

Workspace::Workspace(const Network& network, int64_t max_nodes)
    : proposal(max_nodes),
      weights(max_nodes),
      inputs(max_nodes),
      outputs(max_nodes),
      neighbours(max_nodes),
      activations(max_nodes),
      hidden(aligned_floats(network.gin ? max_nodes * network.stride : 0)),
      pooled(aligned_floats(network.stride)),
      zeros(aligned_floats(network.stride)),
      max_nodes(max_nodes),
      fresh(aligned_floats((network.gin ? 4 : 3) * network.depth() * max_nodes * network.stride)) {
  scores.change.resize(network.norms() * 2 * network.stride);
}

SearchGraph::SearchGraph(const Network& network, int64_t nodes, std::vector<Edge> edges, const float* x,
                         const int64_t* label, int64_t target)
    : network_(network),
      nodes_(nodes),
      stride_(network.stride),
      depth_(network.depth()),
      target_(target),
      x_(x),
      edges_(std::move(edges)),
      neighbours_(nodes),
      degree_scale_(nodes),
      features_(aligned_floats(planes() * nodes * stride_)),
      count_(depth_ + 1),
      place_(nodes, kClean) {
  if (label) label_.assign(label, label + nodes);
}

bool SearchGraph::adjacent(int64_t a, int64_t b) const {
  return std::binary_search(neighbours_[a].begin(), neighbours_[a].end(), static_cast<int32_t>(b));
}

void SearchGraph::link(Edge edge, bool present) {
  for (const auto& [from, to] : {std::pair(edge.low, edge.high), std::pair(edge.high, edge.low)}) {
    std::vector<int32_t>& list = neighbours_[from];
    const auto at = std::lower_bound(list.begin(), list.end(), to);
    present ? void(list.insert(at, to)) : void(list.erase(at));
    degree_scale_[from] = 1.0f / std::sqrt(static_cast<float>(list.size() + 1));
  }
}

bool SearchGraph::connected(ProposalScratch& scratch) const {
  std::fill_n(scratch.marks.begin(), nodes_, uint8_t{0});
  int64_t reached = 1, waiting = 1;
  scratch.marks[0] = 1;
  scratch.stack[0] = 0;
  while (waiting) {
    for (const int32_t neighbour : neighbours_[scratch.stack[--waiting]]) {
      if (scratch.marks[neighbour]) continue;
      scratch.marks[neighbour] = 1;
      scratch.stack[waiting++] = neighbour;
      ++reached;
    }
  }
  return reached == nodes_;
}

void SearchGraph::mark_distance_two(int64_t node, int64_t without, uint8_t* marks) const {
  std::fill_n(marks, nodes_, uint8_t{0});
  for (const int32_t near : neighbours_[node]) {
    if (near == without) continue;
    for (const int32_t far : neighbours_[near]) marks[far] = 1;
  }
  for (const int32_t near : neighbours_[node]) {
    if (near != without) marks[near] = 0;
  }
  marks[node] = 0;
}

void SearchGraph::mark(int64_t node) {
  if (place_[node] != kClean) return;
  place_[node] = static_cast<int32_t>(dirty_.size());
  dirty_.push_back(static_cast<int32_t>(node));
}

void SearchGraph::mark_neighbours(int64_t node) {
  for (const int32_t neighbour : neighbours_[node]) mark(neighbour);
}

// Rows whose neighbours or normalisers an edge move changed, in every layer.
void SearchGraph::mark_rewired(const Edit& edit) {
  for (int k = 0; k < edit.num_old; ++k) mark(edit.old[k].low), mark(edit.old[k].high);
  for (int k = 0; k < edit.num_fresh; ++k) mark(edit.fresh[k].low), mark(edit.fresh[k].high);
  // A swap changes no degree, and a rewired edge leaves that of the end that it keeps alone.
  if (network_.gin || edit.kind == Move::kRelabel || edit.kind == Move::kSwap) return;
  const size_t ends = dirty_.size();
  for (size_t i = 0; i < ends; ++i) {
    const int32_t node = dirty_[i];
    const bool lost = edit.num_old && edit.old[0].ends_in(node), won = edit.num_fresh && edit.fresh[0].ends_in(node);
    if (lost != won) mark_neighbours(node);
  }
}

void SearchGraph::carry_out(const Edit& edit) {
  switch (edit.kind) {
    case Move::kRelabel:
      label_[edit.node] = edit.label_after;
      break;
    case Move::kRewire:
    case Move::kSwap:
      for (int k = 0; k < edit.num_old; ++k) edges_[edit.slot[k]] = edit.fresh[k];
      break;
    case Move::kAdd:
      edges_.push_back(edit.fresh[0]);
      break;
    case Move::kDelete:
      edges_[edit.slot[0]] = edges_.back();
      edges_.pop_back();
  }
  for (int k = 0; k < edit.num_old; ++k) link(edit.old[k], false);
  for (int k = 0; k < edit.num_fresh; ++k) link(edit.fresh[k], true);
}

void SearchGraph::reach(const Edit& edit) {
  for (const int32_t node : dirty_) place_[node] = kClean;
  dirty_.clear();
  if (edit.kind == Move::kRelabel) mark(edit.node);
  count_[0] = static_cast<int64_t>(dirty_.size());
  mark_rewired(edit);
  int64_t expanded = 0;
  for (int64_t l = 0; l < depth_; ++l) {
    // What changed in the layer before reaches the neighbours.
    for (const int64_t stop = count_[l]; expanded < stop; ++expanded) mark_neighbours(dirty_[expanded]);
    count_[l + 1] = static_cast<int64_t>(dirty_.size());
  }
}

void SearchGraph::evaluate(Workspace& work) { compute(false, work); }

void SearchGraph::prefetch() const {
  int64_t left = kPrefetchedBytes / (stride_ * static_cast<int64_t>(sizeof(float)));
  const auto fetch = [&](int64_t plane, int64_t node) {
    if (left-- <= 0) return;
    fetch_row<2>(resident(plane, node), stride_);
  };
  const auto fetch_reached = [&](int64_t plane, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) fetch(plane, dirty_[i]);
  };
  const auto fetch_others = [&](int64_t plane, int64_t begin) {
    for (int64_t node = 0; node < nodes_; ++node) {
      if (place_[node] >= begin) fetch(plane, node);
    }
  };
  for (int64_t l = 0; l < depth_; ++l) {
    fetch_reached(aggregate_plane(l), 0, count_[l + 1]);
    if (network_.gin) fetch_reached(second_plane(l), 0, count_[l + 1]);
    if (l) fetch_reached(output_plane(l - 1), count_[l], count_[l + 1]);
    // The neighbours of the rows of one level are in the next.
    l + 1 < depth_ ? fetch_reached(transform_plane(l), count_[l], count_[l + 2])
                   : fetch_others(transform_plane(l), count_[l]);
  }
  fetch_others(output_plane(depth_ - 1), count_[depth_]);
}

void SearchGraph::keep(const Workspace& work) {
  const auto copy = [&](int64_t plane, int64_t level) {
    const float* from = work.fresh.get() + plane * work.max_nodes * stride_;
    for (int64_t i = 0; i < count_[level]; ++i) std::copy_n(from + i * stride_, stride_, resident(plane, dirty_[i]));
  };
  for (int64_t l = 0; l < depth_; ++l) {
    copy(transform_plane(l), l);
    copy(aggregate_plane(l), l + 1);
    copy(output_plane(l), l + 1);
    if (network_.gin) copy(second_plane(l), l + 1);
  }
}

void SearchGraph::revert(const Edit& edit) {
  switch (edit.kind) {
    case Move::kRelabel:
      label_[edit.node] = edit.label_before;
      break;
    case Move::kRewire:
    case Move::kSwap:
      for (int k = 0; k < edit.num_old; ++k) edges_[edit.slot[k]] = edit.old[k];
      break;
    case Move::kAdd:
      edges_.pop_back();
      break;
    case Move::kDelete:
      if (edit.slot[0] == static_cast<int64_t>(edges_.size())) {
        edges_.push_back(edit.old[0]);
      } else {
        edges_.push_back(edges_[edit.slot[0]]);
        edges_[edit.slot[0]] = edit.old[0];
      }
  }
  for (int k = 0; k < edit.num_fresh; ++k) link(edit.fresh[k], false);
  for (int k = 0; k < edit.num_old; ++k) link(edit.old[k], true);
}

void SearchGraph::rebuild(Workspace& work) {
  for (std::vector<int32_t>& list : neighbours_) list.clear();
  for (const Edge edge : edges_) {
    neighbours_[edge.low].push_back(edge.high);
    neighbours_[edge.high].push_back(edge.low);
  }
  dirty_.resize(nodes_);
  for (int64_t node = 0; node < nodes_; ++node) {
    std::sort(neighbours_[node].begin(), neighbours_[node].end());
    degree_scale_[node] = 1.0f / std::sqrt(static_cast<float>(neighbours_[node].size() + 1));
    dirty_[node] = place_[node] = static_cast<int32_t>(node);
  }
  std::fill(count_.begin(), count_.end(), nodes_);
  compute(true, work);
  keep(work);
}

void SearchGraph::compute(bool anew, Workspace& work) {
  std::fill(work.scores.change.begin(), work.scores.change.end(), 0.0);
  input_rows(work);
  for (int64_t l = 0; l < depth_; ++l) layer_rows(l, anew, work);
  classify(work);
}

void SearchGraph::restore(const std::vector<Edge>& edges, const std::vector<int64_t>& label, Workspace& work) {
  edges_ = edges;
  label_ = label;
  rebuild(work);
}

void SearchGraph::input_rows(Workspace& work) {
  const Linear& linear = network_.layers[0].transform;
  for (int64_t i = 0; i < count_[0]; ++i) {
    const int32_t node = dirty_[i];
    float* out = row(transform_plane(0), 0, node, work);
    if (label_.empty()) {
      work.inputs[i] = x_ + node * network_.features;
      work.outputs[i] = out;
    } else {
      std::memcpy(out, linear.weight.get() + label_[node] * stride_, stride_ * sizeof(float));
    }
  }
  if (label_.empty()) {
    multiply_rows(work.inputs.data(), count_[0], linear.inputs, linear.weight.get(), nullptr, stride_,
                  work.outputs.data());
  }
}

void SearchGraph::layer_rows(int64_t l, bool anew, Workspace& work) {
  const Layer& layer = network_.layers[l];
  const int64_t count = count_[l + 1], level = l + 1, last = network_.gin ? second_plane(l) : aggregate_plane(l);
  double* change = work.scores.change.data() + l * (network_.gin ? 4 : 2) * stride_;
  for (int64_t i = 0; i < count; ++i) {
    const int32_t node = dirty_[i];
    if (!anew) {
      // What `activate` takes the difference from, into the first level cache.
      fetch_row<3>(resident(aggregate_plane(l), node), stride_);
      if (network_.gin) fetch_row<3>(resident(last, node), stride_);
    }
    const std::vector<int32_t>& list = neighbours_[node];
    const float scale = network_.gin ? 1.0f : degree_scale_[node];
    for (size_t j = 0; j < list.size(); ++j) {
      work.neighbours[j] = row(transform_plane(l), l, list[j], work);
      work.weights[j] = network_.gin ? 1.0f : degree_scale_[list[j]];
    }
    gather_row(row(transform_plane(l), l, node, work), network_.gin ? layer.self : scale, work.neighbours.data(),
               work.weights.data(), static_cast<int64_t>(list.size()), scale, layer.transform.bias.get(), stride_,
               row(aggregate_plane(l), level, node, work));
  }
  const auto activate = [&](int64_t plane, const Norm& norm, int64_t residual_plane, const auto& out) {
    for (int64_t i = 0; i < count; ++i) {
      const int32_t node = dirty_[i];
      work.inputs[i] = out(i);
      work.activations[i] = {row(plane, level, node, work), anew ? work.zeros.get() : resident(plane, node),
                             residual_plane < 0 ? nullptr : row(residual_plane, l, node, work), out(i)};
    }
    activate_rows(work.activations.data(), count, norm.scale.get(), norm.shift.get(), stride_, change,
                  change + stride_);
  };
  if (network_.gin) {
    activate(aggregate_plane(l), layer.inner, -1, [&](int64_t i) { return work.hidden.get() + i * stride_; });
    for (int64_t i = 0; i < count; ++i) work.outputs[i] = row(last, level, dirty_[i], work);
    multiply_rows(work.inputs.data(), count, network_.width, layer.second.weight.get(), layer.second.bias.get(),
                  stride_, work.outputs.data());
    change += 2 * stride_;
  }
  activate(last, layer.norm, l ? output_plane(l - 1) : -1,
           [&](int64_t i) { return row(output_plane(l), level, dirty_[i], work); });
  if (level == depth_) return;
  const Linear& next = network_.layers[level].transform;
  for (int64_t i = 0; i < count; ++i) work.outputs[i] = row(transform_plane(level), level, dirty_[i], work);
  multiply_rows(work.inputs.data(), count, network_.width, next.weight.get(), nullptr, stride_, work.outputs.data());
}

void SearchGraph::classify(Workspace& work) {
  float* pooled = work.pooled.get();
  std::memcpy(pooled, row(output_plane(depth_ - 1), depth_, 0, work), stride_ * sizeof(float));
  for (int64_t node = 1; node < nodes_; ++node) {
    const float* h = row(output_plane(depth_ - 1), depth_, node, work);
    network_.pooling == Pooling::kMax ? max_row(h, stride_, pooled) : add_row(h, stride_, pooled);
  }
  if (network_.pooling == Pooling::kMean) {
    for (int64_t k = 0; k < stride_; ++k) pooled[k] /= static_cast<float>(nodes_);
  }
  // Running log-sum-exp: no logits are stored.
  double largest = -HUGE_VAL, sum = 0, own = 0;
  int64_t best = 0;
  for (int64_t c = 0; c < network_.classes; ++c) {
    double logit = network_.classifier_bias[c];
    const float* weight = network_.classifier.data() + c * network_.width;
    for (int64_t k = 0; k < network_.width; ++k) logit += static_cast<double>(weight[k]) * pooled[k];
    if (c == target_) own = logit;
    if (logit > largest) {
      sum = sum * std::exp(largest - logit) + 1.0;
      largest = logit;
      best = c;
    } else {
      sum += std::exp(logit - largest);
    }
  }
  work.scores.loss = largest + std::log(sum) - own;
  work.scores.hit = best == target_;
}

}  // namespace acgkd
