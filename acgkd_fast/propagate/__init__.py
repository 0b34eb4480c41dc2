"""GCN and GIN message passing on sampled edges, and graph readouts."""

from .api import gcn_propagate, gin_propagate, readout

__all__ = ["gcn_propagate", "gin_propagate", "readout"]
