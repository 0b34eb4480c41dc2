"""OGMM (ICLR 2026, arXiv 2506.03674): a generator without inputs, and its graphs as one batch.

The edge network sees every pair of nodes of a graph, without a Cartesian product of their features: its first layer is
linear, so that W [x_i, x_j] = W_1 x_i + W_2 x_j.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ..distill.starts import balanced_labels, sample_sizes
from ..edges import sample_dense_edges
from ..edges.dense import harden
from ..errors import check
from ..graphs import GraphBatch


class GraphGenerator(nn.Module):
    """Labelled graphs from learned node features and an edge network.

    ``generator()`` gives (labels int64 [B], B adjacency matrices n x n, B feature matrices n x d). An edge's
    probability is the mean of the network's sigmoid over both orders of its ends; it is cut (straight through) at `cut`
    to c in {0, 1}, and a hard Gumbel-softmax of temperature `tau` over (1 - c, c) draws it: P = sigmoid(2 c - 1).

    Args:
        num_graphs, num_features, num_classes: B, d, and the classes that labels cycle through.
        min_nodes, max_nodes: node counts are uniform on this range.
        hidden: width of the edge network.
        cut, tau: see above.
        symmetric: share an edge's noise between its two directions. OGMM does not, so that its graphs are directed.
        seed: of sizes, labels, initial values and draws; call t draws with step t.

    Attributes:
        calls: draws made so far; set it to resume.
    """

    def __init__(
        self,
        num_graphs: int,
        num_features: int,
        num_classes: int,
        *,
        min_nodes: int = 10,
        max_nodes: int = 29,
        hidden: int = 32,
        cut: float = 0.9,
        tau: float = 0.1,
        symmetric: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check(0.0 < cut < 1.0, "cut", "a probability", cut)
        check(tau > 0.0, "tau", "a number above 0", tau)
        self.sizes = sample_sizes((min_nodes, max_nodes), num_graphs, seed)
        self.cut, self.tau, self.symmetric, self.seed = cut, tau, symmetric, seed
        self.calls = 0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.features = nn.Parameter(torch.randn(num_graphs, max(self.sizes), num_features))
            self.first = nn.Linear(2 * num_features, hidden)
            self.last = nn.Linear(hidden, 1)
        self.labels: torch.Tensor
        self.mask: torch.Tensor
        self.register_buffer("labels", balanced_labels(num_graphs, num_classes, seed))
        self.register_buffer("mask", torch.arange(max(self.sizes)) < torch.tensor(self.sizes)[:, None])

    def edge_probability(self) -> torch.Tensor:
        """[B, n, n], n the largest size; entries of missing nodes mean nothing."""
        width = self.features.shape[-1]
        left = self.features @ self.first.weight[:, :width].T
        right = nn.functional.linear(self.features, self.first.weight[:, width:], self.first.bias)
        pairs = torch.relu(left[:, :, None] + right[:, None, :])
        one_way = torch.sigmoid(self.last(pairs)).squeeze(-1)
        return (one_way + one_way.mT) / 2.0

    def forward(self) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
        """Another draw of all graphs; gradients reach the features and the edge network."""
        adjacency = self._draw()
        matrices = [a[:n, :n] for a, n in zip(adjacency, self.sizes, strict=True)]
        features = [x[:n] for x, n in zip(self.features, self.sizes, strict=True)]
        return self.labels, matrices, features

    def graphs(self) -> GraphBatch:
        """The same draw as one batch, without a loop over the graphs; `.to_dgl()` gives OGMM's DGL batch."""
        # Rows of a GraphBatch receive, OGMM's rows send.
        return GraphBatch.from_dense(self.features, self._draw().mT, self.mask, self.labels)

    def _draw(self) -> torch.Tensor:
        probability = self.edge_probability()
        kept = harden(probability, probability >= self.cut)
        self.calls += 1
        return sample_dense_edges(
            2.0 * kept - 1.0,
            seed=self.seed,
            step=self.calls - 1,
            temperature=self.tau,
            symmetric="noise" if self.symmetric else "none",
            self_loops=True,
            mask=self.mask,
        )


def as_batch(
    adjacency: Sequence[torch.Tensor], features: Sequence[torch.Tensor], labels: torch.Tensor | None = None
) -> GraphBatch:
    """Lists of matrices, row i sending to the columns that are not zero, as one batch.

    Gradients reach the entries that are not zero. ``.to_dgl()`` gives a DGL batch with edge data "weight".
    """
    check(len(adjacency) == len(features) > 0, "features", "one matrix per adjacency, at least one", features)
    width = max(len(a) for a in adjacency)
    device = features[0].device
    mask = torch.arange(width, device=device) < torch.tensor([len(a) for a in adjacency], device=device)[:, None]
    padded = torch.stack([nn.functional.pad(a, (0, width - len(a)) * 2) for a in adjacency])
    x = torch.stack([nn.functional.pad(x, (0, 0, 0, width - len(x))) for x in features])
    return GraphBatch.from_dense(x, padded.mT, mask, labels)
