"""Column statistics, and the frozen BatchNorm with what follows it, as fused operators."""

from .api import column_moments, frozen_norm_relu

__all__ = ["column_moments", "frozen_norm_relu"]
