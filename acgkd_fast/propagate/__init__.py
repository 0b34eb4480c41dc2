"""GCN, GIN and GAT message passing on sampled edges, and graph readouts."""

from .api import gat_propagate, gcn_propagate, gin_propagate, readout

__all__ = ["gat_propagate", "gcn_propagate", "gin_propagate", "readout"]
