"""Message-passing layers that use edge weights, and the graph classifiers built from them."""

from .conv import GCNConv, GINConv
from .models import GraphClassifier, build_model

__all__ = ["GCNConv", "GINConv", "GraphClassifier", "build_model"]
