// Gradients of scattered pairs: their noise is drawn again, 64 at a time.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/matrix.h"
#include "cpu/sample.h"

namespace acgkd {

// Pairs waiting for their slope.
template <typename Real>
struct Batch {
  alignas(64) Real theta[kLanes], grad[kLanes], u[kLanes], z[kLanes], slope[kLanes];
  uint32_t counters[kLanes], lanes[kLanes], graphs[kLanes], words[kLanes];
  int64_t place[kLanes];
  int size = 0;

  // A pair by its number inside its graph, and the place of its result.
  void add(const GraphLayout& graph, int64_t local, int64_t to, Real theta_value, Real grad_value) {
    counters[size] = static_cast<uint32_t>(local / 4);
    lanes[size] = static_cast<uint32_t>(local % 4);
    graphs[size] = graph.id;
    place[size] = to;
    theta[size] = theta_value;
    grad[size++] = grad_value;
  }
};

// d value / d theta of a full block of pairs: see pair_slope in acgkd_fast/edges/reference.py.
template <typename Real>
void slopes(const Draw& draw, const Real* theta, const Real* u, Real* z, Real* slope) {
  const Real temperature = static_cast<Real>(draw.temperature);
  scaled_block(theta, u, draw.noise, temperature, z);
  bell_block(z, slope);
  if (draw.estimator == kHardConcrete) {
    const Real gamma = static_cast<Real>(draw.gamma), stretch = static_cast<Real>(draw.zeta - draw.gamma);
    Real soft[kLanes];
    soft_block(z, soft);
    for (int i = 0; i < kLanes; ++i) {
      const Real stretched = soft[i] * stretch + gamma;
      slope[i] *= stretched > Real(0) && stretched < Real(1) ? stretch : Real(0);
    }
  } else if (draw.estimator == kSparseStraightThrough) {
    weigh_block(drawn_block(theta, u, draw.noise), static_cast<Real>(draw.absent_rate), slope);
  }
  if (temperature == Real(1)) return;
  for (int i = 0; i < kLanes; ++i) slope[i] /= temperature;
}

// out[place] = slope times gradient of each pair in the batch, which is empty then.
template <typename Stored>
void flush(const Draw& draw, Batch<WideOf<Stored>>& batch, Stored* out) {
  if (batch.size == 0) return;
  for (int i = batch.size; i < kLanes; ++i) {
    batch.counters[i] = batch.lanes[i] = batch.graphs[i] = 0;
    batch.theta[i] = 0;
  }
  words_scattered(draw.address, batch.counters, batch.lanes, batch.graphs, batch.words);
  uniforms_block(batch.words, false, batch.u);
  slopes(draw, batch.theta, batch.u, batch.z, batch.slope);
  for (int i = 0; i < batch.size; ++i) out[batch.place[i]] = static_cast<Stored>(batch.slope[i] * batch.grad[i]);
  batch.size = 0;
}

// Gradient that arrived at the opposite direction of entry e = (row, col) of an undirected sample.
template <typename Stored>
WideOf<Stored> mirrored_grad(const Matrix& sample, const int64_t* pair, const Stored* grad, int64_t row, int64_t e,
                             int64_t first_node) {
  const int32_t other = sample.col[e], wanted = static_cast<int32_t>(row);
  const int64_t begin = sample.rowptr[other], end = sample.rowptr[other + 1];
  // A full row needs no search: it skips its own node only.
  int64_t found = begin + row - first_node - (row > other);
  if (found < begin || found >= end || sample.col[found] != wanted) {
    found = std::lower_bound(sample.col + begin, sample.col + end, wanted) - sample.col;
  }
  if (found == end || sample.col[found] != wanted || pair[found] != pair[e]) return 0;
  return static_cast<WideOf<Stored>>(grad[found]);
}

// The same for rows visited in ascending order: the opposites of a row's smaller partners are then met in order, and
// each is the one behind the last, which a search would find at the price of several mispredicted branches.
template <typename Stored>
class Mirrors {
 public:
  Mirrors(const Matrix& sample, const int64_t* pair, const Stored* grad) : sample_(sample), pair_(pair), grad_(grad) {}

  // Before the first row of a graph that is visited.
  void enter(const GraphLayout& graph, int64_t row) {
    first_node_ = graph.first_node;
    next_.resize(graph.num_nodes);
    for (int64_t i = 0; i < graph.num_nodes; ++i) {
      const int64_t node = first_node_ + i;
      const int32_t *begin = sample_.col + sample_.rowptr[node], *end = sample_.col + sample_.rowptr[node + 1];
      const int32_t* from = node < row ? std::lower_bound(begin, end, static_cast<int32_t>(row)) : end;
      next_[i] = static_cast<int32_t>(from - sample_.col);
    }
  }

  // Behind a row, whose entries from `entry` on lead to larger partners.
  void leave(int64_t row, int64_t entry) { next_[row - first_node_] = static_cast<int32_t>(entry); }

  WideOf<Stored> operator()(int64_t row, int64_t e) {
    const int32_t other = sample_.col[e];
    const int64_t local = other - first_node_;
    if (local >= 0 && local < static_cast<int64_t>(next_.size())) {
      int32_t& at = next_[local];
      if (at < sample_.rowptr[other + 1] && sample_.col[at] == row && pair_[at] == pair_[e]) {
        return static_cast<WideOf<Stored>>(grad_[at++]);
      }
    }
    return mirrored_grad(sample_, pair_, grad_, row, e, first_node_);
  }

 private:
  const Matrix& sample_;
  const int64_t* pair_;
  const Stored* grad_;
  int64_t first_node_ = 0;
  std::vector<int32_t> next_;
};

}  // namespace acgkd
