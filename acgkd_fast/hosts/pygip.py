"""PyGIP's data-free attack (BSD-2; after STEALGNN, USENIX Security 2024): the generator of its query graph.

PyGIP queries one Erdos-Renyi graph (p = 0.05) with Gaussian features that is never trained. Ours starts there and
has parameters: one logit per pair of nodes, and the features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..edges import sample_edges
from ..graphs import GraphBatch
from ..layout import PairLayout

_EDGE_CHANCE = 0.05


class GraphGenerator(nn.Module):
    """A query graph whose structure and features can be trained.

    Args:
        node_number, feature_number, label_number: PyGIP's arguments; labels are not used there either.
        xi: share of the pairs that carry a logit, see :class:`PairLayout`; below 1 for large graphs.
        estimator, temperature: of :func:`sample_edges`.
        seed: of the initial values and the draws; call t draws with step t.

    Attributes:
        logits: parameter [P], sigmoid(logits) = 0.05 at the start.
        features: parameter [node_number, feature_number], Gaussian at the start.
        calls: draws made so far; set it to resume.
    """

    def __init__(
        self,
        node_number: int,
        feature_number: int,
        label_number: int,
        *,
        xi: float = 1.0,
        estimator: str = "sparse_straight_through",
        temperature: float = 1.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.node_number, self.feature_number, self.label_number = node_number, feature_number, label_number
        self.layout = PairLayout.budget([node_number], xi)
        self.estimator, self.temperature, self.seed = estimator, temperature, seed
        self.calls = 0
        # A budget holds fewer pairs; the mean degree is to stay that of p = 0.05 on all of them.
        chance = min(_EDGE_CHANCE * node_number * (node_number - 1) / 2 / max(self.layout.num_pairs, 1), 0.5)
        self.logits = nn.Parameter(torch.full((self.layout.num_pairs,), chance).logit())
        generator = torch.Generator().manual_seed(seed)
        self.features = nn.Parameter(torch.randn(node_number, feature_number, generator=generator))

    def forward(self) -> GraphBatch:
        """One draw; gradients reach `logits` and `features`."""
        self.calls += 1
        edges = sample_edges(
            self.logits,
            self.layout.to(self.logits.device),
            seed=self.seed,
            step=self.calls - 1,
            estimator=self.estimator,
            temperature=self.temperature,
        )
        return GraphBatch(self.features, edges)

    def generate(self) -> tuple[Any, torch.Tensor]:
        """PyGIP's pair (DGL graph, features), with edge data "weight" that carries the gradient to the logits.

        Entries of weight 0, which sparse straight-through adds for its gradient, count as edges to a model that
        ignores weights; give the constructor estimator "straight_through" for such a model.

        Raises:
            InputError: DGL cannot be imported; ``generator()`` gives the same graph without it.
        """
        graphs = self()
        return graphs.to_dgl(), graphs.x
