"""Column statistics, the frozen BatchNorm with what follows it, and softmax and entropy of rows, as fused operators."""

from .api import column_moments, frozen_norm_relu, mean_entropy, softmax_rows

__all__ = ["column_moments", "frozen_norm_relu", "mean_entropy", "softmax_rows"]
