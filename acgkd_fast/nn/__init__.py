"""Message-passing layers that use edge weights, the graph classifiers built from them, and `accelerate`."""

from .gat_conv import GATConv
from .gcn_conv import GCNConv
from .gin_conv import GINConv, GINEConv
from .models import GraphClassifier, build_model
from .projected import ProjectedClassifier
from .sage_conv import SAGEConv

__all__ = [
    "GATConv",
    "GCNConv",
    "GINConv",
    "GINEConv",
    "GraphClassifier",
    "ProjectedClassifier",
    "SAGEConv",
    "build_model",
]
