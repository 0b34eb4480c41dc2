"""Binary Concrete edges: sampled, thresholded and differentiated."""

from .api import arm_gradient, sample_edges
from .estimators import ESTIMATORS, NOISES
from .factorised import FactorLogits

__all__ = ["ESTIMATORS", "NOISES", "FactorLogits", "arm_gradient", "sample_edges"]
