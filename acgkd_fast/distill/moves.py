"""Edits of hard graphs: what is proposed from given draws, and how likely the way back is.

Whoever repeats these rules with the same draws, in any language, makes the same proposals; ``docs/search.md``
has them in one place.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import torch

from ..philox import Stream, graph_uniforms
from .edge_lists import EdgeLists, pack, unpack
from .proposal_weights import EdgeProposals


class Lane(IntEnum):
    """What each uniform of a proposal decides."""

    CHOICE = 0  # the graphs with the smallest are edited in this step
    KIND = 1  # which move
    FIRST = 2  # the edge to rewire, delete or swap; the first end of a new edge; the node to relabel
    SECOND = 3  # the new partner; the new label; the other edge of a swap
    END = 4  # the end that a rewired edge keeps: the lower node below 1/2; which of two swaps
    ACCEPT = 5  # Metropolis test
    NEAR = 6  # whether the new partner comes from distance two


# Two counters of four words for every candidate.
LANES = 8


class Move(IntEnum):
    RELABEL = 0
    REWIRE = 1
    ADD = 2
    DELETE = 3
    SWAP = 4


def proposal_uniforms(
    graph_ids: torch.Tensor, first_step: int, num_steps: int, seed: int, proposals: int = 1
) -> torch.Tensor:
    """The draws behind the proposals of some steps, float64 [num_steps, B, 8 proposals] in (0, 1).

    Philox4x32-10 with key `seed` and counter words (k // 4, graph id, step, ``Stream.PROPOSAL``);
    lane k % 4 gives uniform k as ((word >> 9) + 0.5) * 2^-23. Candidate j has the uniforms 8 j to 8 j + 7, and
    :class:`Lane` says what each decides; CHOICE and ACCEPT count for candidate 0 alone. An index among n is
    ``floor(u * n)`` in float64.
    """
    step = torch.arange(first_step, first_step + num_steps, device=graph_ids.device)[:, None]
    return graph_uniforms(graph_ids, step, LANES * proposals, stream=Stream.PROPOSAL, seed=seed)


@dataclass(frozen=True)
class MoveMix:
    """How edits are drawn.

    Attributes:
        relabel: share of the moves that relabel a node.
        rewire: share of the edge moves that rewire; the others are half additions, half deletions.
        two_hop: chance that the new partner of a node is drawn among the nodes at distance two of it.
        keep_degrees: every edge move is a double edge swap; `rewire` and `two_hop` mean nothing.
    """

    relabel: float
    rewire: float
    two_hop: float = 0.0
    keep_degrees: bool = False

    def thresholds(self) -> tuple[float, float, float]:
        """u below the first relabels, below the second rewires, below the third adds, else deletes."""
        edges = 1.0 - self.relabel
        rewired = self.relabel + edges * self.rewire
        return self.relabel, rewired, rewired + 0.5 * edges * (1.0 - self.rewire)


@dataclass(frozen=True)
class Limits:
    """Which edits are allowed.

    Attributes:
        connected: none that leaves a connected graph in parts.
        max_degree: none that raises a degree above this; 0 for no limit.
    """

    connected: bool = False
    max_degree: int = 0


@dataclass(eq=False)
class Edits:
    """One edit for each of S graphs, all moves in the same form.

    The slots of `slots` in the list become `pairs`, the count becomes `count`, and local node `node` gets its
    label raised by `shift` (modulo the number of labels). Moves that change no edge, and moves that are
    impossible, rewrite what is there. Moves of one slot name it twice.

    Attributes:
        kind: int64 [S], see :class:`Move`.
        valid: bool [S], whether the edit is possible and allowed.
        slots, pairs: int64 [S, 2].
        count: int64 [S].
        node, shift: int64 [S].
        old, new: int64 [S], the edge that goes (rewire, delete) and the one that comes (rewire, add).
    """

    kind: torch.Tensor
    valid: torch.Tensor
    slots: torch.Tensor
    pairs: torch.Tensor
    count: torch.Tensor
    node: torch.Tensor
    shift: torch.Tensor
    old: torch.Tensor
    new: torch.Tensor

    def select(self, graphs: torch.Tensor) -> Edits:
        return Edits(**{name: part[graphs] for name, part in vars(self).items()})

    def restricted(self, allowed: torch.Tensor, before: EdgeLists) -> Edits:
        """These where `allowed` [S], and elsewhere edits that are not valid."""
        return Edits(
            self.kind,
            self.valid & allowed,
            torch.where(allowed[:, None], self.slots, 0),
            torch.where(allowed[:, None], self.pairs, before.pairs[:, :1]),
            torch.where(allowed, self.count, before.counts),
            self.node,
            torch.where(allowed, self.shift, 0),
            self.old,
            self.new,
        )


def _index(u: torch.Tensor, n: torch.Tensor | int) -> torch.Tensor:
    return (u * n).long()


def _ordered(one: torch.Tensor, two: torch.Tensor) -> torch.Tensor:
    return pack(torch.minimum(one, two), torch.maximum(one, two))


def propose(
    lists: EdgeLists,
    sizes: torch.Tensor,
    u: torch.Tensor,
    mix: MoveMix,
    num_labels: int,
    *,
    limits: Limits | None = None,
    weights: EdgeProposals | None = None,
    graphs: torch.Tensor | None = None,
) -> Edits:
    """One edit per graph.

    - relabel: a uniform node gets a uniform other label.
    - rewire: a uniform edge keeps a uniform end and moves the other to a uniform node that is neither end.
    - add: a uniform pair. - delete: a uniform edge.
    - swap (with `mix.keep_degrees`, instead of these three): of two uniform edges {a < b} and {c < d} come {a, c} and
      {b, d}, or {a, d} and {b, c}.

    With `weights`, new partners and added pairs are drawn in proportion to them. With chance `mix.two_hop` the
    partner, of the end that a rewired edge keeps or of a uniform node, is instead drawn among the nodes at distance
    two of it, the rewired edge thought away (so that a triangle closes); where there are none, or none of any weight,
    among all. Edits that would double an edge, edits of what is not there and what `limits` forbid come back as
    not valid.

    Args:
        lists: the S graphs, with room for one more edge each.
        sizes: int64 [S], nodes of each graph.
        u: float64 [S, 8], see :func:`proposal_uniforms`.
        mix: how often each move is tried.
        num_labels: number of node labels; relabelling needs 2.
        limits: which edits are allowed; default all.
        weights: proposal distribution over pairs; not with `mix.keep_degrees`.
        graphs: int64 [S], positions of the graphs in the layout of `weights`.
    """
    limits = limits or Limits()
    below_relabel, below_rewire, below_add = mix.thresholds()
    kind_u = u[:, Lane.KIND]
    if mix.keep_degrees:
        kind = torch.where(kind_u >= below_relabel, int(Move.SWAP), int(Move.RELABEL))
        edits = _swaps(lists, u, kind)
    else:
        kind = (kind_u >= below_relabel).long() + (kind_u >= below_rewire) + (kind_u >= below_add)
        edits = _single_moves(lists, sizes, u, kind, mix, limits, weights, graphs)
    relabels = kind == Move.RELABEL
    edits = edits.restricted(edits.valid & ~relabels, lists)
    edits.valid = torch.where(relabels, num_labels > 1, edits.valid)
    edits.node = _index(u[:, Lane.FIRST], sizes)
    edits.shift = torch.where(edits.valid & relabels, 1 + _index(u[:, Lane.SECOND], max(num_labels - 1, 1)), 0)
    if limits.connected:
        edits = edits.restricted(lists.edited(edits).connected(sizes) | ~lists.connected(sizes), lists)
    return edits


def _swaps(lists: EdgeLists, u: torch.Tensor, kind: torch.Tensor) -> Edits:
    counts, pairs = lists.counts, lists.pairs
    one = _index(u[:, Lane.FIRST], counts)
    two = _index(u[:, Lane.SECOND], (counts - 1).clamp(min=1))
    two = two + (two >= one)
    slots = torch.stack([one, two], 1).clamp(max=pairs.shape[1] - 1)
    (low, other_low), (high, other_high) = (end.unbind(1) for end in unpack(pairs.gather(1, slots)))
    along = u[:, Lane.END] < 0.5
    first = _ordered(low, torch.where(along, other_low, other_high))
    second = _ordered(high, torch.where(along, other_high, other_low))
    apart = (low != other_low) & (low != other_high) & (high != other_low) & (high != other_high)
    valid = (counts > 1) & apart & ~lists.holds(first) & ~lists.holds(second)
    nothing = torch.zeros_like(counts)
    return Edits(kind, valid, slots, torch.stack([first, second], 1), counts, nothing, nothing, nothing, nothing)


def _single_moves(
    lists: EdgeLists,
    sizes: torch.Tensor,
    u: torch.Tensor,
    kind: torch.Tensor,
    mix: MoveMix,
    limits: Limits,
    weights: EdgeProposals | None,
    graphs: torch.Tensor | None,
) -> Edits:
    counts, pairs = lists.counts, lists.pairs
    first, second = u[:, Lane.FIRST], u[:, Lane.SECOND]
    adds, deletes = kind == Move.ADD, kind == Move.DELETE
    edge = _index(first, counts)
    old = pairs.gather(1, edge[:, None]).squeeze(1)
    low, high = unpack(old)
    node = _index(first, sizes)
    kept = torch.where(u[:, Lane.END] < 0.5, low, high)
    one = torch.where(adds, node, kept)

    near = two_hop = torch.zeros_like(adds)[:, None]
    if mix.two_hop > 0.0:
        near = (u[:, Lane.NEAR] < mix.two_hop)[:, None]
        two_hop = _closing(lists, one, torch.where(adds, -1, low + high - kept), torch.where(adds, -1, edge), sizes)
        two_hop &= near
    if weights is None:
        partner = _index(second, (sizes - 2).clamp(min=1))
        partner = partner + (partner >= low)
        partner = partner + (partner >= high)
        other = _index(second, (sizes - 1).clamp(min=1))
        other = other + (other >= node)
        two = torch.where(adds, other, partner)
        possible = sizes > torch.where(adds, 1, 2)
        if mix.two_hop > 0.0:
            rank, found = two_hop.long().cumsum(1), two_hop.sum(1)
            picked = (rank <= _index(second, found)[:, None]).sum(1)
            two = torch.where(found > 0, picked, two)
    else:
        assert graphs is not None
        two, total = weights.draw_partner(graphs, one, second, two_hop if mix.two_hop > 0.0 else None)
        joined = weights.draw_pair(graphs, first, second)
        whole = adds & ~near.squeeze(1)
        one, two = torch.where(whole, joined[0], one), torch.where(whole, joined[1], two)
        possible = torch.where(whole, weights.total(graphs), total) > 0

    new = _ordered(one, two)
    if limits.max_degree > 0:
        full = (lists.degree(end) >= limits.max_degree for end in (one, two))
        possible = possible & ~(adds & next(full)) & ~next(full)
    fresh = possible & (one != two) & ~lists.holds(new)
    valid = (adds | (counts > 0)) & (deletes | fresh)
    tail = pairs.gather(1, (counts - 1).clamp(min=0)[:, None]).squeeze(1)
    slot, pair = torch.where(adds, counts, edge), torch.where(deletes, tail, new)
    count = counts + adds.long() - deletes.long()
    slots, changed = slot[:, None].expand(-1, 2), pair[:, None].expand(-1, 2)
    return Edits(kind, valid, slots, changed, count, node, torch.zeros_like(node), old, new)


def _closing(
    lists: EdgeLists, node: torch.Tensor, gone: torch.Tensor, without: torch.Tensor, sizes: torch.Tensor
) -> torch.Tensor:
    """bool [S, nodes of the largest]: what `node` may be joined with by the two-hop rule; `gone` -1 for an addition."""
    width = int(sizes.max())
    found = lists.distance_two(node, without, width)
    return found & (torch.arange(width, device=node.device) != gone[:, None])


def best_candidates(delta: torch.Tensor, valid: torch.Tensor, several: int) -> torch.Tensor:
    """Of `several` candidates per graph, in order, the first of lowest `delta` among the valid; int64, one per graph.

    One that is not valid, or NaN, counts as infinite.
    """
    ranked = torch.where(valid & ~delta.isnan(), delta, torch.inf).view(-1, several)
    return ranked.argmin(1) + torch.arange(ranked.shape[0], device=delta.device) * several


def log_proposal_ratio(
    edits: Edits,
    before: EdgeLists,
    sizes: torch.Tensor,
    mix: MoveMix,
    weights: EdgeProposals | None = None,
    graphs: torch.Tensor | None = None,
) -> torch.Tensor:
    """Log of the chance of proposing the way back over the chance of proposing the edit, float64 [S].

    Exact. Relabelling, swapping and uniform rewiring are symmetric (0); adding and deleting are tried equally often, so
    an addition to m edges has (1 / (m + 1)) / P(pair) and a deletion P(pair) m; with weights, rewiring has
    weight(old) / weight(new), -inf where the old edge carries no logit. With `mix.two_hop` the chances are mixtures.
    The graph without the edge in question is the same on both ways, and so are the nodes at distance two in it.

    Args:
        edits: what :func:`propose` returned.
        before: the S graphs before the edit.
        sizes: int64 [S], nodes.
        mix: as in :func:`propose`.
        weights, graphs: as in :func:`propose`.
    """
    counts = before.counts
    adds, deletes, rewires = (edits.kind == move for move in (Move.ADD, Move.DELETE, Move.REWIRE))
    moved = torch.where(adds, edits.new, edits.old)
    ratio = torch.zeros(counts.shape, dtype=torch.float64, device=counts.device)
    if weights is None:
        chance = 2.0 / (sizes * (sizes - 1)).clamp(min=1).double()
    else:
        assert graphs is not None
        chance = weights.pair_weight(graphs, moved) / weights.total(graphs)
    if mix.two_hop > 0.0 and not mix.keep_degrees:
        h, slot, none = mix.two_hop, torch.where(adds, -1, edits.slots[:, 0]), torch.full_like(counts, -1)
        (low, high), (old_low, old_high), (new_low, new_high) = map(unpack, (moved, edits.old, edits.new))
        ends = [_partner_chance(before, sizes, slot, *e, none, weights, graphs) for e in ((low, high), (high, low))]
        chance = (1.0 - h) * chance + h / sizes * (ends[0][0] + ends[1][0])
        kept = torch.where((old_low == new_low) | (old_low == new_high), old_low, old_high)
        both = old_low + old_high - kept, new_low + new_high - kept
        back, there = (
            _partner_chance(before, sizes, slot, kept, partner, gone, weights, graphs)
            for partner, gone in (both, both[::-1])
        )
        back_log, there_log = ((h * near + (1.0 - h) * far).log() for near, far in (back, there))
        ratio = torch.where(rewires, back_log - there_log, ratio)
    elif weights is not None:
        assert graphs is not None
        old, new = (weights.pair_weight(graphs, pair) for pair in (edits.old, edits.new))
        ratio = torch.where(rewires, old.log() - new.log(), ratio)
    ratio = torch.where(adds, -((counts + 1) * chance).log(), ratio)
    ratio = torch.where(deletes, (counts * chance).log(), ratio)
    return torch.where(edits.valid, ratio, 0.0)


def _partner_chance(
    lists: EdgeLists,
    sizes: torch.Tensor,
    without: torch.Tensor,
    node: torch.Tensor,
    partner: torch.Tensor,
    gone: torch.Tensor,
    weights: EdgeProposals | None,
    graphs: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Chances of drawing `partner` for `node` by the two-hop rule and without it; `gone` as in :func:`_closing`."""
    # Edits that are not valid may name nodes that are not there; behind the last graph lies nothing at all.
    node, partner = (end.clamp(min=0).minimum(sizes - 1) for end in (node, partner))
    partner = partner[:, None]
    closing = _closing(lists, node, gone, without, sizes)
    if weights is None:
        share = closing.double()
        far = 1.0 / (sizes - 1 - (gone >= 0).long()).clamp(min=1).double()
    else:
        assert graphs is not None
        row = weights.row(graphs, node)
        share = torch.where(closing, row, 0.0)
        far = row.gather(1, partner).squeeze(1) / row.sum(1)
    total = share.sum(1)
    return torch.where(total > 0.0, share.gather(1, partner).squeeze(1) / total, far), far
