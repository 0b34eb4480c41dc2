"""Data-free GNN extraction (STEALGNN, USENIX Security 2024; an MIT reimplementation's interface): one graph per z.

The reimplementation turns its matrix into an edge list by ``nonzero`` and drops the values, so that its structure gets
no gradient, and its complete "full_param" matrix becomes the complete graph. Here the matrix keeps a gradient, and
:meth:`GraphGenerator.graph` gives edges that carry it through a layer.
"""

from __future__ import annotations

import torch
from torch import nn

from ..edges import sample_edges
from ..edges.dense import harden
from ..errors import check, check_choice
from ..graphs import EdgeSample
from ..layout import PairLayout

GENERATOR_TYPES = ("cosine", "full_param")


class GraphGenerator(nn.Module):
    """Features and structure from noise, with the host's arguments, parameters and state-dict keys.

    Args:
        noise_dim, num_nodes, feature_dim: widths of z, and of the graph.
        generator_type: "cosine" joins nodes whose features have a cosine above `threshold`; "full_param" has a
            network for the matrix.
        threshold: of the cosine.
        slope: temperature of the straight-through gradient of the cut: that of sigmoid((cosine - threshold) / slope).
        seed: of the draws of "full_param" in :meth:`graph`; call t draws with step t.

    Attributes:
        calls: draws made so far; set it to resume.
    """

    def __init__(
        self,
        noise_dim: int,
        num_nodes: int,
        feature_dim: int,
        generator_type: str = "cosine",
        threshold: float = 0.1,
        *,
        slope: float = 0.1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_choice("generator_type", generator_type, GENERATOR_TYPES)
        check(slope > 0.0, "slope", "a number above 0", slope)
        self.noise_dim, self.num_nodes, self.feature_dim = noise_dim, num_nodes, feature_dim
        self.generator_type, self.threshold, self.slope, self.seed = generator_type, threshold, slope, seed
        self.calls = 0
        self.feature_gen = _network(noise_dim, num_nodes * feature_dim, nn.Tanh())
        if generator_type == "full_param":
            self.structure_gen = _network(noise_dim, num_nodes * num_nodes, nn.Sigmoid())

    def forward(self, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(features [n, d], row-normalised matrix [n, n] without a diagonal) for z [1, noise_dim].

        The values are the host's; gradients reach every parameter, through the cut too.
        """
        features = self._features(z)
        if self.generator_type == "cosine":
            above = self._cosine(features) - self.threshold
            adjacency = harden(torch.sigmoid(above / self.slope), above > 0.0)
        else:
            adjacency = self._probability(z)
        adjacency = adjacency.masked_fill(torch.eye(self.num_nodes, dtype=torch.bool, device=z.device), 0.0)
        return features, adjacency / adjacency.sum(1, keepdim=True).clamp(min=1.0)

    def graph(self, z: torch.Tensor) -> tuple[torch.Tensor, EdgeSample]:
        """(features [n, d], edges) for z, to be given to this package's layers in place of ``(x, edge_index)``.

        "cosine" gives the pairs of the host's edge list value 1 and all others value 0. "full_param" draws each pair
        with its probability, where the host's edge list is the complete graph. Gradients reach every parameter,
        through edges and absent pairs.
        """
        features = self._features(z)
        layout = PairLayout.complete([self.num_nodes], device=z.device)
        row, col = layout.pair_nodes()
        if self.generator_type == "cosine":
            theta = (self._cosine(features)[row, col] - self.threshold) / self.slope
            return features, _cut(theta, layout)
        theta = torch.logit(self._probability(z)[row, col], eps=1e-6)
        self.calls += 1
        return features, sample_edges(theta, layout, seed=self.seed, step=self.calls - 1)

    def adj_to_edge_index(self, adj: torch.Tensor) -> torch.Tensor:
        """The host's edge list int64 [2, E] of the entries that are not zero; carries no gradient."""
        return adj.nonzero().t()

    def _features(self, z: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.feature_gen(z)
        return features.view(self.num_nodes, self.feature_dim)

    def _cosine(self, features: torch.Tensor) -> torch.Tensor:
        unit = nn.functional.normalize(features, dim=1)
        return unit @ unit.t()

    def _probability(self, z: torch.Tensor) -> torch.Tensor:
        matrix = self.structure_gen(z).view(self.num_nodes, self.num_nodes)
        return (matrix + matrix.t()) / 2.0


def _cut(theta: torch.Tensor, layout: PairLayout) -> EdgeSample:
    """Every pair as an edge: of value 1 where theta > 0, else 0, with the slope of sigmoid(theta) everywhere."""
    row, col = layout.pair_nodes()
    value = harden(torch.sigmoid(theta), theta > 0.0)
    both = torch.stack([torch.cat([row, col]), torch.cat([col, row])])
    return EdgeSample.from_edge_index(both, layout.node_ptr, torch.cat([value, value]), symmetric=True)


def _network(inputs: int, outputs: int, last: nn.Module) -> nn.Sequential:
    layers = [nn.Linear(inputs, 128), nn.ReLU(), nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, outputs)]
    return nn.Sequential(*layers, last)
