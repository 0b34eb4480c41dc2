"""Learned logits as the distribution of new edges."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..errors import check, check_tensor
from ..layout import PairLayout
from .edge_lists import unpack


@dataclass(eq=False)
class EdgeProposals:
    """Where new edges go: partners in proportion to sigmoid(logit) of a candidate pair.

    Pairs that carry no logit are never proposed. Undirected layouts only.
    """

    layout: PairLayout
    weight: torch.Tensor
    cumulative: torch.Tensor

    @classmethod
    def from_logits(cls, layout: PairLayout, logits: torch.Tensor, ptr: torch.Tensor) -> EdgeProposals:
        """From the logits of a layout over the same graphs, node offsets `ptr`.

        Raises:
            InputError: a directed layout, sizes that are not those of the graphs, logits of another
                shape or NaN among them.
        """
        undirected = isinstance(layout, PairLayout) and not layout.directed
        check(undirected, "edge_weights", "an undirected PairLayout", layout)
        check(torch.equal(layout.node_ptr, ptr), "edge_weights", "a layout with the sizes of the graphs", layout.sizes)
        check_tensor("edge_weights", logits, shape=(layout.num_pairs,), device=ptr.device)
        check(not bool(logits.isnan().any()), "edge_weights", "logits that are numbers", "NaN")
        weight = torch.sigmoid(logits.detach().double())
        return cls(layout, weight, torch.nn.functional.pad(weight.cumsum(0), (1, 0)))

    def total(self, graphs: torch.Tensor) -> torch.Tensor:
        ends = self.layout.pair_ptr
        return self.cumulative[ends[graphs + 1]] - self.cumulative[ends[graphs]]

    def draw_pair(
        self, graphs: torch.Tensor, first: torch.Tensor, second: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A pair of local nodes of each graph, in proportion to its weight.

        Two uniforms make one of 46 bits: large graphs have more pairs than one has values.
        """
        start, stop = self.layout.pair_ptr[graphs], self.layout.pair_ptr[graphs + 1]
        target = self.cumulative[start] + (first + (second - 0.5) * 2.0**-23) * self.total(graphs)
        pair = torch.searchsorted(self.cumulative, target, right=True) - 1
        low, high = self.layout.pair_nodes(torch.minimum(pair, stop - 1).clamp(min=0))
        base = self.layout.node_ptr[graphs]
        return low - base, high - base

    def row(self, graphs: torch.Tensor, node: torch.Tensor) -> torch.Tensor:
        """Weights of all partners of a local node of each graph, float64 [S, nodes of the largest]; 0 where none."""
        base, stop = self.layout.node_ptr[graphs], self.layout.node_ptr[graphs + 1]
        width = int((stop - base).max())
        other = base[:, None] + torch.arange(width, device=node.device)
        inside = other < stop[:, None]
        other = torch.where(inside, other, base[:, None])
        pair = self.layout.pair_index((base + node)[:, None].expand_as(other).contiguous(), other)
        return torch.where(inside & (pair >= 0), self.weight[pair.clamp(min=0)], 0.0)

    def draw_partner(
        self, graphs: torch.Tensor, node: torch.Tensor, u: torch.Tensor, among: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A partner of a local node of each graph, in proportion to weight, and the sum of the weights.

        Args:
            graphs, node: int64 [S].
            u: float64 [S].
            among: bool [S, nodes of the largest graph]; where these have any weight, the partner is one of them.
        """
        weight = self.row(graphs, node)
        if among is not None:
            chosen = torch.where(among, weight, 0.0)
            weight = torch.where((chosen > 0.0).any(1, keepdim=True), chosen, weight)
        cumulative = weight.cumsum(1)
        total = cumulative[:, -1]
        partner = torch.searchsorted(cumulative, (u * total)[:, None], right=True).squeeze(1)
        nodes = self.layout.node_ptr[graphs + 1] - self.layout.node_ptr[graphs]
        return torch.minimum(partner, nodes - 1), total

    def pair_weight(self, graphs: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
        """Weight of a packed local pair of each graph; 0 where the layout has no such pair."""
        low, high = unpack(packed)
        base = self.layout.node_ptr[graphs]
        pair = self.layout.pair_index(base + low, base + high)
        return torch.where(pair >= 0, self.weight[pair.clamp(min=0)], 0.0)
