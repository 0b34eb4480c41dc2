// The energy of the pool, and its slope in the moments; see acgkd_fast/distill/energy.py.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "cpu/search_network.h"

namespace acgkd {

class Energy {
 public:
  // `running` is float64 [3, C]: running mean, target and floor of distill.statistics.RunningGaussians.
  Energy(const Network& network, const double* running, int64_t rows, int64_t num_graphs, double lam_k, double w_ce,
         double cap)
      : norms_(network.norms()),
        width_(network.width),
        stride_(network.stride),
        rows_(static_cast<double>(rows)),
        lam_k_(lam_k),
        share_(w_ce / static_cast<double>(num_graphs)),
        cap_(cap),
        mean_(running),
        target_(running + channels()),
        floor_(running + 2 * channels()) {}

  int64_t channels() const { return norms_ * width_; }

  double excess(double loss) const { return std::max(loss - cap_, 0.0) * share_; }

  // `total` [2, C].
  double k(const double* total) const {
    double sum = 0;
    for (int64_t c = 0; c < channels(); ++c) {
      const double first = total[c] / rows_, second = total[channels() + c] / rows_;
      const double ratio = (std::max(second - first * first, 0.0) + floor_[c]) / target_[c];
      sum += ratio - 1.0 - std::log(ratio) + (first - mean_[c]) * (first - mean_[c]) / target_[c];
    }
    return 0.5 * sum / static_cast<double>(channels());
  }

  double value(const double* total, double excess) const { return lam_k_ * k(total) + excess; }

  // d (lam_k K) / d total, in the padded order [norms, 2, stride] of a graph's own sums.
  void slope(const double* total, std::vector<double>& out) const {
    const double factor = lam_k_ / (rows_ * static_cast<double>(channels()));
    for (int64_t c = 0; c < channels(); ++c) {
      const double first = total[c] / rows_, variance = total[channels() + c] / rows_ - first * first;
      const double in_second =
          variance >= 0.0 ? 0.5 / target_[c] - 0.5 / (std::max(variance, 0.0) + floor_[c]) : 0.0;
      const int64_t at = c / width_ * 2 * stride_ + c % width_;
      out[at] = factor * ((first - mean_[c]) / target_[c] - 2.0 * first * in_second);
      out[at + stride_] = factor * in_second;
    }
  }

  // total += change, from the padded order.
  void add(const std::vector<double>& change, double* total) const {
    for (int64_t norm = 0; norm < norms_; ++norm) {
      for (int64_t order = 0; order < 2; ++order) {
        const double* from = change.data() + (2 * norm + order) * stride_;
        double* to = total + order * channels() + norm * width_;
        for (int64_t k = 0; k < width_; ++k) to[k] += from[k];
      }
    }
  }

 private:
  int64_t norms_, width_, stride_;
  double rows_, lam_k_, share_, cap_;
  const double *mean_, *target_, *floor_;
};

}  // namespace acgkd
