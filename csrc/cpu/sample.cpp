#include "cpu/sample.h"

#include <algorithm>

namespace acgkd {
namespace {

// Short ranges share a chunk, and with it a list of hits.
template <typename Real>
void split(const Layouts& layouts, Drawn<Real>& drawn) {
  drawn.piece_ptr.assign(layouts.num_graphs + 1, 0);
  int64_t filled = 0, chunk = 0;
  for (const PairRange& range : pair_ranges(layouts)) {
    drawn.pieces.push_back({range, chunk});
    drawn.piece_ptr[range.graph + 1] = static_cast<int64_t>(drawn.pieces.size());
    filled += range.end - range.begin;
    if (filled >= kRangePairs) filled = 0, ++chunk;
  }
  // A graph of one node has no range: it ends where the one before it does.
  for (int64_t g = 0; g < layouts.num_graphs; ++g) {
    drawn.piece_ptr[g + 1] = std::max(drawn.piece_ptr[g], drawn.piece_ptr[g + 1]);
  }
  drawn.chunks.resize(chunk + (filled > 0));
}

struct Decision {
  uint64_t kept, drawn;
};

template <typename Real>
struct Lanes {
  alignas(64) Real theta[kLanes], u[kLanes], z[kLanes], value[kLanes];
};

// Masks of the pairs to keep and of those with theta + L > 0 for estimators of 0/1 values; the others fill lanes.value.
template <typename Real>
Decision decide(const Draw& draw, const Address& address, uint32_t counter, Lanes<Real>& lanes) {
  uint32_t words[2 * kLanes];
  if (draw.estimator == kSparseStraightThrough && draw.noise == kLogistic && draw.temperature == 1.0) {
    words_two_streams(address, kAbsentStream, counter, words);
    const SparseDraw found = sparse_block(lanes.theta, words, static_cast<Real>(draw.absent_rate));
    return {found.drawn | found.absent, found.drawn};
  }
  words_block(address, counter, words);
  uniforms_block(words, draw.estimator == kArmMirrored, lanes.u);
  if (draw.hard()) {
    const uint64_t drawn = drawn_block(lanes.theta, lanes.u, draw.noise);
    return {drawn, drawn};
  }

  scaled_block(lanes.theta, lanes.u, draw.noise, static_cast<Real>(draw.temperature), lanes.z);
  if (draw.estimator == kSparseStraightThrough) {
    const uint64_t drawn = drawn_block(lanes.theta, lanes.u, draw.noise);
    bell_block(lanes.z, lanes.value);
    Address absent = address;
    absent.stream = kAbsentStream;
    words_block(absent, counter, words);
    uniforms_block(words, false, lanes.u);
    const uint64_t sampled = absent_block(lanes.u, lanes.value, static_cast<Real>(draw.absent_rate));
    return {drawn | sampled, drawn};
  }
  soft_block(lanes.z, lanes.value);
  if (draw.estimator == kRelaxed) return {~uint64_t(0), 0};

  const Real gamma = static_cast<Real>(draw.gamma), zeta = static_cast<Real>(draw.zeta);
  uint64_t kept = 0;
  for (int i = 0; i < kLanes; ++i) {
    const Real stretched = lanes.value[i] * (zeta - gamma) + gamma;
    lanes.value[i] = stretched > Real(1) ? Real(1) : stretched;
    kept |= static_cast<uint64_t>(stretched > Real(0)) << i;
  }
  return {kept, 0};
}

}  // namespace

template <typename Real>
Drawn<Real> draw_pairs(const LogitSource<Real>& logits, const Layouts& layouts, const Draw& draw) {
  Drawn<Real> drawn;
  split(layouts, drawn);

  const auto draw_piece = [&](Piece& piece) {
    const GraphLayout graph = layouts[piece.graph];
    Hits<Real>& hits = drawn.chunks[piece.chunk];
    Address address = draw.address;
    address.graph = graph.id;
    Lanes<Real> lanes;
    piece.hits_begin = hits.size();
    for (int64_t first = piece.begin; first < piece.end; first += kLanes) {
      const int count = static_cast<int>(std::min<int64_t>(kLanes, piece.end - first));
      logits(graph, first, count, lanes.theta);
      Decision found = decide(draw, address, static_cast<uint32_t>(first / 4), lanes);
      if (count < kLanes) found.kept &= (uint64_t(1) << count) - 1;
      if (draw.hard()) {
        hits.append(first, found.kept);
      } else if (draw.estimator == kSparseStraightThrough) {
        hits.append(first, found.kept, [&](int lane) { return static_cast<Real>(found.drawn >> lane & 1); });
      } else {
        hits.append(first, found.kept, [&](int lane) { return lanes.value[lane]; });
      }
    }
    piece.hits_end = hits.size();
  };

  // A chunk belongs to one thread, which meets its pieces in order.
  const auto by_chunk = [](const Piece& piece, int64_t chunk) { return piece.chunk < chunk; };
  torch::stable::parallel_for(0, static_cast<int64_t>(drawn.chunks.size()), 1, [&](int64_t begin, int64_t end) {
    const auto first = std::lower_bound(drawn.pieces.begin(), drawn.pieces.end(), begin, by_chunk);
    const auto last = std::lower_bound(first, drawn.pieces.end(), end, by_chunk);
    std::for_each(first, last, draw_piece);
    for (int64_t chunk = begin; chunk < end; ++chunk) drawn.chunks[chunk].shrink();
  });
  return drawn;
}

template Drawn<float> draw_pairs<float>(const LogitSource<float>&, const Layouts&, const Draw&);
template Drawn<double> draw_pairs<double>(const LogitSource<double>&, const Layouts&, const Draw&);

}  // namespace acgkd
