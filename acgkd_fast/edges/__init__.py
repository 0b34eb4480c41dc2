"""Binary Concrete edges: sampled, thresholded and differentiated."""

from .api import arm_gradient, sample_edges
from .dense import sample_dense_edges
from .estimators import ESTIMATORS, NOISES
from .factorised import FactorLogits

__all__ = ["ESTIMATORS", "NOISES", "FactorLogits", "arm_gradient", "sample_dense_edges", "sample_edges"]
