"""Message-passing layers that use edge weights, and the graph classifiers built from them."""

from .attention import GATConv
from .conv import GCNConv, GINConv
from .models import GraphClassifier, build_model
from .projected import ProjectedClassifier

__all__ = ["GATConv", "GCNConv", "GINConv", "GraphClassifier", "ProjectedClassifier", "build_model"]
