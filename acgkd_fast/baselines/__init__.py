"""Other ways to teach a student without data, and the ceilings and floors that a result stands between."""

from .dfad import DFADSettings, dfad
from .gfkd import GFKDSettings, gfkd_graphs
from .pools import Pool, balanced_random_pool, inverted_features, random_pools

__all__ = [
    "DFADSettings",
    "GFKDSettings",
    "Pool",
    "balanced_random_pool",
    "dfad",
    "gfkd_graphs",
    "inverted_features",
    "random_pools",
]
