"""GammaGL's DFAD-GNN example (IJCAI 2022, arXiv 2205.03811): generator and batch construction, with a gradient.

In the host the adjacency is cast to integers, and edges and features are cut, so that its generator gets no gradient.
TensorLayerX with its torch backend computes on torch tensors, which are what is taken and given here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ..edges.dense import harden
from ..errors import check, check_tensor
from ..graphs import GraphBatch
from .cuts import cut_edges


class DFADGenerator(nn.Module):
    """z [B, z_dim] -> (edge logits [B, N, N], node logits [B, N, d]), with the host's arguments.

    Linear, Tanh and Dropout at every width of `conv_dims`, a linear layer to the node logits, and their inner products
    for the edges. The host truncates these to integers; :func:`data_construct` sees to that.
    """

    def __init__(
        self, conv_dims: Sequence[int], z_dim: int, num_vertices: int, num_features: int, dropout: float
    ) -> None:
        super().__init__()
        check(len(conv_dims) >= 1, "conv_dims", "at least one width", conv_dims)
        self.num_vertices, self.num_features = num_vertices, num_features
        layers: list[nn.Module] = []
        for before, width in zip((z_dim, *conv_dims), conv_dims, strict=False):
            layers += [nn.Linear(before, width), nn.Tanh(), nn.Dropout(dropout)]
        self.layer_list = nn.Sequential(*layers)
        self.nodes_layer = nn.Linear(conv_dims[-1], num_vertices * num_features)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        nodes = self.nodes_layer(self.layer_list(x)).view(-1, self.num_vertices, self.num_features)
        return torch.bmm(nodes, nodes.transpose(1, 2)), nodes


def data_construct(
    batch_size: int, edges_logits: torch.Tensor, nodes_logits: torch.Tensor, *, threshold: float = 0.3
) -> list[GraphBatch]:
    """Batches of the host's graphs: one-hot nodes by argmax, edges where the sigmoid is above `threshold`.

    Self-loops are edges like others, as in the host, which computes the sigmoid of the truncated logit: with its
    threshold, a logit above -1 makes an edge.

    Args:
        batch_size: graphs per batch.
        edges_logits: [B, N, N], symmetric.
        nodes_logits: [B, N, d].
        threshold: see above.

    Returns:
        Batches with ``x``, ``edges`` and ``batch()``. Gradients reach both logits, straight through; those of the edges
        are the sigmoid's, absent ones included.

    Raises:
        InputError: tensors of other forms.
    """
    check(batch_size >= 1, "batch_size", "at least 1", batch_size)
    check_tensor("nodes_logits", nodes_logits, shape=(None, None, None))
    graphs, nodes, width = nodes_logits.shape
    check_tensor("edges_logits", edges_logits, shape=(graphs, nodes, nodes), device=nodes_logits.device)
    soft = nodes_logits.softmax(-1)
    x = harden(soft, nn.functional.one_hot(soft.argmax(-1), width).bool())
    present = torch.sigmoid(edges_logits.detach().trunc()) > threshold
    chance = torch.sigmoid(edges_logits)
    return [
        GraphBatch(features.flatten(0, 1), cut_edges(p, there))
        for features, p, there in zip(
            x.split(batch_size), chance.split(batch_size), present.split(batch_size), strict=True
        )
    ]
