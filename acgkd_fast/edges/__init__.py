"""Binary Concrete edges: sampled, thresholded and differentiated."""

from .api import arm_gradient, sample_edges
from .estimators import ESTIMATORS, NOISES

__all__ = ["ESTIMATORS", "NOISES", "arm_gradient", "sample_edges"]
