"""Padded edge lists of many simple undirected graphs, and what an edit has to know of them.

Everything here works on all graphs at once, without a loop over graphs and without a matrix per graph. An undirected
edge {low < high} of local node numbers is one int64, ``low << 32 | high``. A graph's list is in the order of its
history (an added edge goes to the end, a deleted one is replaced by the last), because a proposal picks edges by
position.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..errors import InputError
from ..graphs import EdgeSample

if TYPE_CHECKING:
    from .moves import Edits

_SHIFT = 32
_LOW_BITS = 2**_SHIFT - 1


def pack(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    return (low << _SHIFT) | high


def unpack(pair: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return pair >> _SHIFT, pair & _LOW_BITS


@dataclass(eq=False)
class EdgeLists:
    """Padded edge lists of B simple undirected graphs.

    Attributes:
        pairs: int64 [B, capacity], packed edges; what stands behind a graph's count means nothing.
        counts: int64 [B], edges of each graph.
    """

    pairs: torch.Tensor
    counts: torch.Tensor

    @classmethod
    def from_edges(cls, edges: EdgeSample) -> EdgeLists:
        """Lists in CSR order of the edges row < col.

        Raises:
            InputError: a self-loop, a repeated edge, an edge without its opposite or of a weight
                other than 1, or one between two graphs.
        """
        size, nodes = edges.num_edges, edges.num_nodes
        row, col = edges.row(), edges.col[:size].long()
        keys, mirrored = row * nodes + col, col * nodes + row
        simple = (
            bool((row != col).all())
            and bool((edges.value[:size] == 1).all())
            and bool((keys[1:] > keys[:-1]).all())
            and torch.equal(mirrored.sort()[0], keys)
        )
        graph = torch.searchsorted(edges.ptr, row, right=True) - 1
        simple = simple and bool((col >= edges.ptr[graph]).all()) and bool((col < edges.ptr[graph + 1]).all())
        if not simple:
            raise InputError(
                "edges: expected simple undirected graphs (both directions, sorted, weight 1, no self-loops, "
                "none twice), got others; draw hard graphs first"
            )
        upper = row < col
        row, col, graph = row[upper], col[upper], graph[upper]
        counts = torch.bincount(graph, minlength=edges.num_graphs)
        width = max(1, int(counts.max())) if edges.num_graphs else 1
        slot = torch.arange(row.numel(), device=row.device) - (counts.cumsum(0) - counts)[graph]
        pairs = row.new_zeros(edges.num_graphs, width)
        pairs[graph, slot] = pack(row - edges.ptr[graph], col - edges.ptr[graph])
        return cls(pairs, counts)

    def reserve(self, edges: int) -> None:
        """Make room for `edges` more in every graph."""
        missing = int(self.counts.max()) + edges - self.pairs.shape[1] if self.counts.numel() else 0
        if missing > 0:
            self.pairs = torch.nn.functional.pad(self.pairs, (0, missing))

    def select(self, graphs: torch.Tensor) -> EdgeLists:
        return EdgeLists(self.pairs[graphs], self.counts[graphs])

    def edited(self, edits: Edits) -> EdgeLists:
        """New lists, with the edit of every graph carried out."""
        return EdgeLists(self.pairs.scatter(1, edits.slots, edits.pairs), edits.count)

    def put(self, graphs: torch.Tensor, before: EdgeLists, edits: Edits, keep: torch.Tensor) -> None:
        """Carry out, in place, the edits that are kept.

        Args:
            graphs: int64 [S], where the edited graphs are in these lists.
            before: those S graphs as they are.
            edits: one edit each.
            keep: bool [S].
        """
        old = before.pairs.gather(1, edits.slots)
        self.pairs[graphs[:, None], edits.slots] = torch.where(keep[:, None], edits.pairs, old)
        self.counts[graphs] = torch.where(keep, edits.count, before.counts)

    def clone(self) -> EdgeLists:
        return EdgeLists(self.pairs.clone(), self.counts.clone())

    def used(self) -> torch.Tensor:
        """bool [B, capacity]: the slots that hold an edge."""
        return torch.arange(self.pairs.shape[1], device=self.pairs.device) < self.counts[:, None]

    def to_edges(self, ptr: torch.Tensor, num_nodes: int) -> EdgeSample:
        """CSR of all graphs, both directions, weights 1: one sort."""
        low, high = unpack((self.pairs + (ptr[:-1] * (2**_SHIFT + 1))[:, None])[self.used()])
        key, _ = torch.cat([pack(low, high), pack(high, low)]).sort()
        row, col = unpack(key)
        rowptr = torch.searchsorted(row, torch.arange(num_nodes + 1, device=row.device), out_int32=True)
        return EdgeSample(rowptr, col.int(), torch.ones(key.numel(), device=key.device), ptr, symmetric=True)

    def holds(self, pair: torch.Tensor) -> torch.Tensor:
        """bool [S]: whether each graph has the packed edge `pair` [S]."""
        return ((self.pairs == pair[:, None]) & self.used()).any(1)

    def degree(self, node: torch.Tensor) -> torch.Tensor:
        """int64 [S]: the degree of one node [S] of each graph."""
        low, high = unpack(self.pairs)
        return (((low == node[:, None]) | (high == node[:, None])) & self.used()).sum(1)

    def distance_two(self, node: torch.Tensor, without: torch.Tensor, width: int) -> torch.Tensor:
        """Nodes at distance two of one node of each graph: neighbours of neighbours, neither it nor neighbours.

        Args:
            node: int64 [S].
            without: int64 [S], slot of an edge to be thought away, or -1.
            width: nodes of the largest graph or more.

        Returns:
            bool [S, width].
        """
        slot = torch.arange(self.pairs.shape[1], device=node.device)
        live = self.used() & (slot != without[:, None])
        low, high = unpack(self.pairs)
        # Slots that count for nothing write to one column too many.
        low, high = (torch.where(live, end, width).clamp(max=width) for end in (low, high))
        node = node[:, None]

        def reached(ends: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
            found = torch.zeros(node.shape[0], width + 1, dtype=torch.bool, device=node.device)
            found.scatter_(1, torch.where(ends, high, width), True)
            return found.scatter_(1, torch.where(others, low, width), True)

        near = reached(low == node, high == node)
        near[:, width] = False
        two = reached(near.gather(1, low), near.gather(1, high)) & ~near
        return two.scatter_(1, node, False)[:, :width]

    def connected(self, sizes: torch.Tensor) -> torch.Tensor:
        """bool [S]: whether each graph of `sizes` [S] nodes is connected. Some passes over all edges at once."""
        width = int(sizes.max()) if sizes.numel() else 0
        column = torch.arange(width, device=sizes.device)
        low, high = (torch.where(self.used(), end, 0) for end in unpack(self.pairs))
        label = column.expand(sizes.numel(), width)
        while True:
            # Smallest number seen, for both ends and for whom they stood for; then everybody asks whom he stands for.
            one, two = label.gather(1, low), label.gather(1, high)
            least = torch.minimum(one, two)
            after = label
            for ends in (low, high, one, two):
                after = after.scatter_reduce(1, ends, least, "amin")
            after = after.gather(1, after)
            if torch.equal(after, label):
                return ((label == 0) | (column >= sizes[:, None])).all(1)
            label = after
