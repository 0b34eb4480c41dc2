"""FedTAD in OpenFGL (IJCAI 2024, arXiv 2404.14061): the pseudo-graph of its generator, with a topology that learns.

The host joins each node to its k most similar ones by ``topk`` and hands out an edge list, so that its generator learns
nothing about edges.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch

from ..errors import InputError, check, check_tensor
from .cuts import cut_edges


def construct_graph(node_logits: torch.Tensor, adj_logits: torch.Tensor, k: int = 5, *, slope: float = 0.1) -> Any:
    """The k nearest neighbours of every node, in either direction, and a self-loop on each.

    Args:
        node_logits: [n, d], the features.
        adj_logits: [n, n], symmetric similarities; ``.detach()`` them for the host's missing gradient.
        k: neighbours, among which a node counts itself where it is the most similar.
        slope: temperature of the straight-through gradient: that of sigmoid((a_ij - t_ij) / slope), t_ij the lower of
            the two nodes' k-th largest similarities.

    Returns:
        PyTorch Geometric's Data with ``x`` and, in the place of ``edge_index``, an EdgeSample, which layers of
        :func:`acgkd_fast.accelerate` and this package's take. The host lists each self-loop twice; here it is there
        once, which is the same to a GCN.

    Raises:
        InputError: tensors of other forms, `k` out of range, or no torch-geometric.
    """
    check_tensor("node_logits", node_logits, shape=(None, None))
    nodes = len(node_logits)
    check_tensor("adj_logits", adj_logits, shape=(nodes, nodes), device=node_logits.device)
    check(1 <= k <= nodes, "k", f"1 to {nodes}, the number of nodes", k)
    check(slope > 0.0, "slope", "a number above 0", slope)
    best = adj_logits.detach().topk(k, dim=1)
    near = torch.zeros_like(adj_logits, dtype=torch.bool).scatter_(1, best.indices, True)
    last = best.values[:, -1]
    soft = torch.sigmoid((adj_logits - torch.minimum(last[:, None], last[None, :])) / slope)
    own = torch.eye(nodes, dtype=torch.bool, device=adj_logits.device)
    edges = cut_edges(soft.masked_fill(own, 1.0)[None], (near | near.t() | own)[None])
    try:
        data: Any = importlib.import_module("torch_geometric.data")
    except ImportError as error:
        raise InputError("construct_graph: expected torch-geometric, which it makes a Data of (extra pyg)") from error
    return data.Data(x=node_logits, edge_index=edges, num_nodes=nodes)
