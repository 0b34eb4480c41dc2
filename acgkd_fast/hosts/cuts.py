"""Dense matrices that a host cuts into edge lists, as edges that keep their gradient."""

from __future__ import annotations

import torch

from ..edges.dense import harden
from ..graphs import EdgeSample


def cut_edges(soft: torch.Tensor, present: torch.Tensor) -> EdgeSample:
    """Every entry of symmetric matrices as an edge of value 1 or 0 (present or not), with the gradient of `soft`.

    Edges of value 0 are there for their gradient: they say nothing to a layer that takes weights, and are dropped
    before a teacher that takes none.

    Args:
        soft: [B, n, n], symmetric.
        present: bool [B, n, n], symmetric.
    """
    graphs, n, _ = soft.shape
    device = soft.device
    first = torch.arange(graphs, dtype=torch.int32, device=device) * n
    col = (first[:, None, None] + torch.arange(n, dtype=torch.int32, device=device)).expand(graphs, n, n).reshape(-1)
    rowptr = torch.arange(graphs * n + 1, dtype=torch.int32, device=device) * n
    ptr = torch.arange(graphs + 1, device=device) * n
    return EdgeSample(rowptr, col, harden(soft, present).reshape(-1), ptr, True)
