// Ranges of candidate pairs, the unit of work of everything that visits all of them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/blocks.h"
#include "cpu/tensors.h"

namespace acgkd {

// Large enough to outweigh starting a thread, small enough to balance the load; a multiple of kLanes.
constexpr int64_t kRangePairs = 1 << 14;

// Pairs begin .. end - 1 of one graph, by their number inside it.
struct PairRange {
  int64_t graph, begin, end;
};

inline std::vector<PairRange> pair_ranges(const Layouts& layouts) {
  std::vector<PairRange> ranges;
  ranges.reserve(layouts.num_graphs + layouts.num_pairs / kRangePairs);
  for (int64_t g = 0; g < layouts.num_graphs; ++g) {
    const int64_t pairs = layouts[g].num_pairs;
    for (int64_t begin = 0; begin < pairs; begin += kRangePairs) {
      ranges.push_back({g, begin, std::min(pairs, begin + kRangePairs)});
    }
  }
  return ranges;
}

// Calls function(graph, address of its noise, first pair inside the graph, count <= kLanes), in parallel.
template <typename Function>
void for_pair_blocks(const Layouts& layouts, const Address& address, const Function& function) {
  const std::vector<PairRange> ranges = pair_ranges(layouts);
  const int64_t total = static_cast<int64_t>(ranges.size());
  const int64_t grain = std::max<int64_t>(1, kRangePairs * total / std::max<int64_t>(1, layouts.num_pairs));
  torch::stable::parallel_for(0, total, grain, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const GraphLayout graph = layouts[ranges[r].graph];
      Address mine = address;
      mine.graph = graph.id;
      for (int64_t first = ranges[r].begin; first < ranges[r].end; first += kLanes) {
        function(graph, mine, first, static_cast<int>(std::min<int64_t>(kLanes, ranges[r].end - first)));
      }
    }
  });
}

// Widens `count` values, the rest of the block becoming 0.
template <typename Stored>
void load_block(const Stored* from, int count, WideOf<Stored>* to) {
  for (int i = 0; i < count; ++i) to[i] = static_cast<WideOf<Stored>>(from[i]);
  std::fill(to + count, to + kLanes, WideOf<Stored>(0));
}

}  // namespace acgkd
