"""Edits of hard graphs: padded edge lists, proposals, and back to CSR.

Everything here works on all chosen graphs at once, without a loop over graphs and without a
matrix per graph. An undirected edge {low < high} of local node numbers is one int64,
``low << 32 | high``. A graph's list is in the order of its history (an added edge goes to the end,
a deleted one is replaced by the last), because a proposal picks edges by position: whoever repeats
these rules with the same draws, in any language, makes the same proposals.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import torch

from ..errors import InputError, check, check_tensor
from ..graphs import EdgeSample
from ..layout import PairLayout
from ..philox import Stream, graph_uniforms

_SHIFT = 32
_LOW_BITS = 2**_SHIFT - 1


class Lane(IntEnum):
    """What each uniform of a proposal decides."""

    CHOICE = 0  # the graphs with the smallest are edited in this step
    KIND = 1  # which move
    FIRST = 2  # the edge to rewire or delete; the first end of a new edge; the node to relabel
    SECOND = 3  # the new partner; the new label
    END = 4  # the end that a rewired edge keeps: the lower node below 1/2
    ACCEPT = 5  # Metropolis test


class Move(IntEnum):
    RELABEL = 0
    REWIRE = 1
    ADD = 2
    DELETE = 3


def proposal_uniforms(graph_ids: torch.Tensor, first_step: int, num_steps: int, seed: int) -> torch.Tensor:
    """The draws behind the proposals of some steps, float64 [num_steps, B, 6] in (0, 1).

    Philox4x32-10 with key `seed` and counter words (k // 4, graph id, step, ``Stream.PROPOSAL``);
    lane k % 4 gives uniform k as ((word >> 9) + 0.5) * 2^-23, and :class:`Lane` says what k decides. An
    index among n is ``floor(u * n)`` in float64.
    """
    step = torch.arange(first_step, first_step + num_steps, device=graph_ids.device)[:, None]
    return graph_uniforms(graph_ids, step, len(Lane), stream=Stream.PROPOSAL, seed=seed)


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
        return EdgeLists(self.pairs.scatter(1, edits.slot[:, None], edits.pair[:, None]), edits.count)

    def put(self, graphs: torch.Tensor, before: EdgeLists, edits: Edits, keep: torch.Tensor) -> None:
        """Carry out, in place, the edits that are kept.

        Args:
            graphs: int64 [S], where the edited graphs are in these lists.
            before: those S graphs as they are.
            edits: one edit each.
            keep: bool [S].
        """
        old = before.pairs.gather(1, edits.slot[:, None]).squeeze(1)
        self.pairs[graphs, edits.slot] = torch.where(keep, edits.pair, old)
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

    def draw_partner(
        self, graphs: torch.Tensor, node: torch.Tensor, u: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A partner of a local node of each graph, in proportion to weight, and the sum of the weights."""
        base, stop = self.layout.node_ptr[graphs], self.layout.node_ptr[graphs + 1]
        width = int((stop - base).max())
        other = base[:, None] + torch.arange(width, device=node.device)
        inside = other < stop[:, None]
        other = torch.where(inside, other, base[:, None])
        pair = self.layout.pair_index((base + node)[:, None].expand_as(other).contiguous(), other)
        weight = torch.where(inside & (pair >= 0), self.weight[pair.clamp(min=0)], 0.0).cumsum(1)
        total = weight[:, -1]
        partner = torch.searchsorted(weight, (u * total)[:, None], right=True).squeeze(1)
        return torch.minimum(partner, stop - base - 1), total

    def pair_weight(self, graphs: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
        """Weight of a packed local pair of each graph; 0 where the layout has no such pair."""
        low, high = unpack(packed)
        base = self.layout.node_ptr[graphs]
        pair = self.layout.pair_index(base + low, base + high)
        return torch.where(pair >= 0, self.weight[pair.clamp(min=0)], 0.0)


@dataclass(frozen=True)
class MoveMix:
    """Shares of the moves. Edge moves that do not rewire are half additions, half deletions."""

    relabel: float
    rewire: float

    def thresholds(self) -> tuple[float, float, float]:
        """u below the first relabels, below the second rewires, below the third adds, else deletes."""
        edges = 1.0 - self.relabel
        rewired = self.relabel + edges * self.rewire
        return self.relabel, rewired, rewired + 0.5 * edges * (1.0 - self.rewire)


@dataclass(eq=False)
class Edits:
    """One edit for each of S graphs, all moves in the same form.

    Slot `slot` of the list becomes `pair`, the count becomes `count`, and local node `node` gets its
    label raised by `shift` (modulo the number of labels). Moves that change no edge, and moves that are
    impossible, rewrite what is there.

    Attributes:
        kind: int64 [S], see :class:`Move`.
        valid: bool [S], whether the edit is possible.
        slot, pair, count: int64 [S].
        node, shift: int64 [S].
        old, new: int64 [S], the edge that goes (rewire, delete) and the one that comes (rewire, add).
    """

    kind: torch.Tensor
    valid: torch.Tensor
    slot: torch.Tensor
    pair: torch.Tensor
    count: torch.Tensor
    node: torch.Tensor
    shift: torch.Tensor
    old: torch.Tensor
    new: torch.Tensor


def _index(u: torch.Tensor, n: torch.Tensor | int) -> torch.Tensor:
    return (u * n).long()


def propose(
    lists: EdgeLists,
    sizes: torch.Tensor,
    u: torch.Tensor,
    mix: MoveMix,
    num_labels: int,
    *,
    weights: EdgeProposals | None = None,
    graphs: torch.Tensor | None = None,
) -> Edits:
    """One edit per graph.

    - relabel: a uniform node gets a uniform other label.
    - rewire: a uniform edge keeps a uniform end and moves the other to a uniform node that is neither end.
    - add: a uniform pair. - delete: a uniform edge.

    With `weights`, new partners and added pairs are drawn in proportion to them. Edits that would double
    an edge, and edits of what is not there, come back as not valid.

    Args:
        lists: the S graphs, with room for one more edge each.
        sizes: int64 [S], nodes of each graph.
        u: float64 [S, 6], see :func:`proposal_uniforms`.
        mix: how often each move is tried.
        num_labels: number of node labels; relabelling needs 2.
        weights: proposal distribution over pairs.
        graphs: int64 [S], positions of the graphs in the layout of `weights`.
    """
    counts, pairs = lists.counts, lists.pairs
    _, kind_u, first, second, end, _ = u.unbind(1)
    below_relabel, below_rewire, below_add = mix.thresholds()
    kind = (kind_u >= below_relabel).long() + (kind_u >= below_rewire) + (kind_u >= below_add)
    relabels, adds, deletes = kind == Move.RELABEL, kind == Move.ADD, kind == Move.DELETE
    edge = _index(first, counts)
    old = pairs.gather(1, edge[:, None]).squeeze(1)
    low, high = unpack(old)
    node = _index(first, sizes)

    kept = torch.where(end < 0.5, low, high)
    if weights is None:
        partner = _index(second, (sizes - 2).clamp(min=1))
        partner = partner + (partner >= low)
        partner = partner + (partner >= high)
        other = _index(second, (sizes - 1).clamp(min=1))
        joined = node, other + (other >= node)
        possible = sizes > torch.where(adds, 1, 2)
    else:
        assert graphs is not None
        partner, partners = weights.draw_partner(graphs, kept, second)
        joined = weights.draw_pair(graphs, first, second)
        possible = torch.where(adds, weights.total(graphs), partners) > 0

    one, two = torch.where(adds, joined[0], kept), torch.where(adds, joined[1], partner)
    new = pack(torch.minimum(one, two), torch.maximum(one, two))
    present = ((pairs == new[:, None]) & lists.used()).any(1)
    fresh = possible & (one != two) & ~present
    valid = torch.where(relabels, num_labels > 1, (adds | (counts > 0)) & (deletes | fresh))

    last = (counts - 1).clamp(min=0)
    tail = pairs.gather(1, last[:, None]).squeeze(1)
    changes = valid & ~relabels
    slot = torch.where(changes, torch.where(adds, counts, edge), 0)
    pair = torch.where(changes, torch.where(deletes, tail, new), pairs[:, 0])
    count = counts + (changes & adds).long() - (changes & deletes).long()
    shift = torch.where(valid & relabels, 1 + _index(second, max(num_labels - 1, 1)), 0)
    return Edits(kind, valid, slot, pair, count, node, shift, old, new)


def log_proposal_ratio(
    edits: Edits,
    counts: torch.Tensor,
    sizes: torch.Tensor,
    weights: EdgeProposals | None = None,
    graphs: torch.Tensor | None = None,
) -> torch.Tensor:
    """Log of the chance of proposing the way back over the chance of proposing the edit, float64 [S].

    Exact. Relabelling and uniform rewiring are symmetric (0); adding and deleting are tried equally often, so
    an addition to m edges has (1 / (m + 1)) / P(pair) and a deletion P(pair) m; with weights, rewiring has
    weight(old) / weight(new), -inf where the old edge carries no logit.

    Args:
        edits: what :func:`propose` returned.
        counts, sizes: int64 [S], edges before the edit and nodes.
        weights, graphs: as in :func:`propose`.
    """
    adds, deletes, rewires = (edits.kind == move for move in (Move.ADD, Move.DELETE, Move.REWIRE))
    moved = torch.where(adds, edits.new, edits.old)
    ratio = torch.zeros(counts.shape, dtype=torch.float64, device=counts.device)
    if weights is None:
        chance = 2.0 / (sizes * (sizes - 1)).clamp(min=1).double()
    else:
        assert graphs is not None
        old, new = (weights.pair_weight(graphs, pair) for pair in (edits.old, edits.new))
        ratio = torch.where(rewires, old.log() - new.log(), ratio)
        chance = weights.pair_weight(graphs, moved) / weights.total(graphs)
    ratio = torch.where(adds, -((counts + 1) * chance).log(), ratio)
    ratio = torch.where(deletes, (counts * chance).log(), ratio)
    return torch.where(edits.valid, ratio, 0.0)
