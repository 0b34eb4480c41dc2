"""GCond, GraphSlim and their kin (GCond: ICLR 2022, arXiv 2110.07580): the network that makes a graph of node features.

It sees every ordered pair of nodes. Its first layer is linear, so that W [x_i, x_j] = W_1 x_i + W_2 x_j and no matrix
of n^2 concatenated features is made, which for bag-of-words features is nearly all of the host's work.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import nn

from ..edges import sample_edges
from ..errors import check, check_tensor
from ..graphs import EdgeSample
from ..layout import PairLayout

# Data sets for which the host widens the network.
_WIDE = ("ogbn-arxiv", "arxiv", "flickr", "reddit")


class PGE(nn.Module):
    """An n x n matrix in (0, 1) from node features [n, nfeat], with the host's arguments and state-dict keys.

    Layers of width `nhid` with BatchNorm over all n^2 pairs and ReLU, then one logit per pair, averaged over both
    orders of its ends.

    Args:
        nfeat, nnodes, nhid, nlayers: widths, nodes and linear layers (2 or more).
        device: not used; the parameters are where ``.to()`` puts them, as in the host.
        args: the host's, of which ``dataset`` and, for reddit, ``reduction_rate`` set `nhid` as there; default None.
        seed: of the draws in :meth:`graph`; call t draws with step t.

    Attributes:
        calls: draws made so far; set it to resume.
    """

    def __init__(
        self,
        nfeat: int,
        nnodes: int,
        nhid: int = 128,
        nlayers: int = 3,
        device: Any = None,
        args: Any = None,
        *,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check(nlayers >= 2, "nlayers", "at least 2", nlayers)
        dataset = getattr(args, "dataset", None)
        if dataset in _WIDE:
            nhid = 128 if dataset == "reddit" and args.reduction_rate == 0.01 else 256
        nlayers = 3 if dataset == "reddit" else nlayers
        widths = [2 * nfeat, *[nhid] * (nlayers - 1), 1]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))
        self.bns = nn.ModuleList(nn.BatchNorm1d(nhid) for _ in range(nlayers - 1))
        self.nnodes, self.seed = nnodes, seed
        self.calls = 0

    def forward(self, x: torch.Tensor, inference: bool = False) -> torch.Tensor:
        """[n, n], symmetric, with a zero diagonal; gradients reach `x` and all parameters.

        `inference` changes nothing, as in the host.
        """
        adjacency = torch.sigmoid(self.logits(x))
        return adjacency.masked_fill(torch.eye(self.nnodes, dtype=torch.bool, device=x.device), 0.0)

    @torch.no_grad()
    def inference(self, x: torch.Tensor) -> torch.Tensor:
        """:meth:`forward` without gradients."""
        adjacency: torch.Tensor = self(x, inference=True)
        return adjacency

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """[n, n] before the sigmoid, symmetric."""
        n = self.nnodes
        first: Any = self.layers[0]
        width = first.in_features // 2
        check_tensor("x", x, shape=(n, width))
        weight, bias = first.weight, first.bias
        senders = nn.functional.linear(x, weight[:, :width], bias)
        receivers = nn.functional.linear(x, weight[:, width:])
        hidden = (senders[:, None] + receivers[None, :]).flatten(0, 1)
        for norm, layer in zip(self.bns, self.layers[1:], strict=True):
            hidden = layer(torch.relu(norm(hidden)))
        logits = hidden.view(n, n)
        return (logits + logits.t()) / 2.0

    def graph(self, x: torch.Tensor) -> EdgeSample:
        """A graph drawn with these edge probabilities, for this package's layers: sparse and differentiable."""
        layout = PairLayout.complete([self.nnodes], device=x.device)
        row, col = layout.pair_nodes()
        self.calls += 1
        return sample_edges(self.logits(x)[row, col], layout, seed=self.seed, step=self.calls - 1)

    def reset_parameters(self) -> None:
        parts: list[Any] = [*self.layers, *self.bns]
        for part in parts:
            part.reset_parameters()
