"""The product of many rows with a small constant matrix, as a fused operator of the CPU."""

from .ops import frozen_linear

__all__ = ["frozen_linear"]
