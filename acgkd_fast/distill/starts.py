"""Start graphs for the search: sparse and connected, or random at a given density.

Density is what the search cannot repair, because degree normalisation hides it from the teacher.
Sparse connected starts are therefore the default, and :func:`random_graphs` is the baseline that
every result must beat.

All graphs of a batch grow at once. Structure comes from the package's random stream (``Stream.INIT``
and ``Stream.EDGE``), addressed by graph id: a graph does not depend on its neighbours in the batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..data import degree_features
from ..edges import sample_edges
from ..errors import InputError, check, check_choice
from ..graphs import EdgeSample
from ..layout import PairLayout
from ..philox import Stream, graph_uniforms
from ..pseudo_graphs import FEATURE_KINDS

# Parents are drawn in proportion to degree and accepted with chance degree^(attachment - 1); about
# two draws in three pass, so that sixteen failures in a row (the last draw then stands) are one in 10^7.
_PARENT_DRAWS = 16
# A walk that runs into a leaf closes no ring and is tried again.
_RING_DRAWS = 16
_RING_LANES = 8
_RING_SIZES = (3, 4, 5, 6)
# Extra edges use step words that no node position reaches.
_EXTRA_STEP = 2**31
_DRAWS_AT_ONCE = 2**18


def sample_sizes(prior: tuple[int, int], count: int, seed: int) -> tuple[int, ...]:
    """Node counts of `count` graphs, uniform on prior[0]..prior[1].

    Raises:
        InputError: an empty range, sizes below 1 or a negative count.
    """
    check(len(prior) == 2 and 1 <= prior[0] <= prior[1], "prior", "(low, high) with 1 <= low <= high", prior)
    check(count >= 0, "count", "a number of graphs", count)
    drawn = torch.randint(prior[0], prior[1] + 1, (count,), generator=_generator(seed))
    return tuple(drawn.tolist())


def balanced_labels(count: int, num_classes: int, seed: int) -> torch.Tensor:
    """int64 [count]: every class equally often (to within one), in random order.

    Raises:
        InputError: fewer than 1 class or a negative count.
    """
    check(num_classes >= 1, "num_classes", "at least 1 class", num_classes)
    check(count >= 0, "count", "a number of graphs", count)
    return (torch.arange(count) % num_classes)[torch.randperm(count, generator=_generator(seed))]


def random_trees(
    sizes: Sequence[int],
    *,
    extra_edges: float = 0.08,
    attachment: float = 0.5,
    seed: int,
    graph_ids: Sequence[int] | None = None,
    device: torch.device | str = "cpu",
) -> EdgeSample:
    """Sparse connected graphs: random trees plus a few edges that close rings.

    Node t joins an earlier node, chosen with weight degree^attachment. Then about
    `extra_edges` * n edges close a ring of 3, 4, 5 or 6 nodes or join any pair, each kind being
    as likely as the others, which gives a mean degree of about 2 (1 + extra_edges) - 2 / n.

    Args:
        sizes: nodes of each graph, each at least 1.
        extra_edges: edges beyond the tree, per node; 0 or more. Where a small graph has no room
            for a new ring, fewer are placed.
        attachment: exponent of the degree, in [0, 1]; 0 is a uniform parent, 1 preferential attachment.
        seed: 64-bit key.
        graph_ids: distinct ids that address the noise; default 0..B-1.
        device: where the edges shall live. They are drawn on the CPU.

    Returns:
        EdgeSample of symmetric, simple graphs with weights 1.

    Raises:
        InputError: an argument outside its range, naming it.
    """
    check(extra_edges >= 0.0, "extra_edges", "a number of edges per node, 0 or more", extra_edges)
    check(0.0 <= attachment <= 1.0, "attachment", "an exponent in [0, 1]", attachment)
    layout = PairLayout.complete(sizes, graph_ids=graph_ids)
    ptr, ids = layout.node_ptr, layout.table[2, :-1]
    parent = _grow(ptr, ids, attachment, seed)
    child = (parent >= 0).nonzero().squeeze(1)
    tree = torch.stack([parent[child], child])
    tree_edges = EdgeSample.from_edge_index(torch.cat([tree, tree.flip(0)], 1), ptr, symmetric=True)
    closing = _close_rings(tree_edges, ids, extra_edges, seed)
    edges = torch.cat([tree, tree.flip(0), closing, closing.flip(0)], 1)
    return EdgeSample.from_edge_index(edges, ptr, symmetric=True).to(device)


def _grow(ptr: torch.Tensor, ids: torch.Tensor, attachment: float, seed: int) -> torch.Tensor:
    """Parent of every node as a node number of the batch, -1 for the first node of each graph."""
    parent = torch.full((int(ptr[-1]),), -1)
    # A node counts its own edge to its parent from the start; nobody looks at it before it has joined.
    degree = torch.ones_like(parent)
    # Largest first, so that the graphs still growing are a prefix.
    sizes, order = (ptr[1:] - ptr[:-1]).sort(descending=True)
    base, ids = ptr[:-1][order], ids[order]
    parent[(base + 1)[sizes > 1]] = base[sizes > 1]
    at_least = torch.bincount(sizes).flip(0).cumsum(0).flip(0).tolist()  # [t]: graphs of t nodes and more
    draws, one = torch.arange(_PARENT_DRAWS), torch.ones_like(parent)
    position = 2
    while position < len(at_least) - 1:
        growing = at_least[position + 1]
        stop = min(len(at_least) - 1, position + max(1, _DRAWS_AT_ONCE // (growing * 2 * _PARENT_DRAWS)))
        t = torch.arange(position, stop)[:, None]
        u = graph_uniforms(ids[:growing], t, 2 * _PARENT_DRAWS, stream=Stream.INIT, seed=seed)
        end, accept = u[..., :_PARENT_DRAWS], u[..., _PARENT_DRAWS:]
        # A random end of a random edge is a node in proportion to its degree. Edge i joins node i + 1 to its parent.
        end = (end * (2 * (t[:, :, None] - 1))).long()
        child, is_child = base[:growing, None] + end // 2 + 1, end % 2 == 0
        # u < degree^(attachment - 1), solved for the degree.
        most = accept ** (-1.0 / (1.0 - attachment)) if attachment < 1.0 else torch.full_like(accept, torch.inf)
        for k in range(stop - position):
            growing = at_least[position + k + 1]
            joined = child[k, :growing]
            candidate = torch.where(is_child[k, :growing], joined, parent[joined])
            accepted = degree[candidate] < most[k, :growing]
            draw = torch.where(accepted, draws, _PARENT_DRAWS - 1).amin(1, keepdim=True)
            chosen = candidate.gather(1, draw).squeeze(1)
            parent[base[:growing] + (position + k)] = chosen
            degree.index_add_(0, chosen, one[:growing])
        position = stop
    return parent


def _close_rings(tree: EdgeSample, ids: torch.Tensor, extra_edges: float, seed: int) -> torch.Tensor:
    """Edges [2, count], lower node first, that are not in the tree; none twice."""
    if tree.num_edges == 0:
        return torch.empty(2, 0, dtype=torch.int64)
    sizes = tree.ptr[1:] - tree.ptr[:-1]
    zero = torch.zeros((), dtype=torch.int64)
    rounding = graph_uniforms(ids, zero, 1, stream=Stream.INIT, seed=seed).squeeze(-1)
    wanted = (extra_edges * sizes + rounding).long()
    graph = torch.arange(sizes.numel()).repeat_interleave(wanted)
    slot = torch.arange(graph.numel()) - (wanted.cumsum(0) - wanted)[graph]
    u = graph_uniforms(ids[graph], _EXTRA_STEP + slot, _RING_DRAWS * _RING_LANES, stream=Stream.INIT, seed=seed)
    kind, start, *walk = u.view(-1, _RING_DRAWS, _RING_LANES).unbind(-1)
    # One kind for all tries of a slot: drawn anew, the long walks that fail more often would turn into short ones.
    kind = kind[:, :1]

    first, n = tree.ptr[graph][:, None], sizes[graph][:, None]
    kind = (kind * (len(_RING_SIZES) + 1)).long()
    steps = torch.where(kind < len(_RING_SIZES), kind + _RING_SIZES[0] - 1, 0)
    here = first + (start * n).long()
    # Without immediate return a walk in a tree never comes back, so its length is the distance of its ends.
    before, at = torch.full_like(here, -1), here
    stuck = torch.zeros_like(here, dtype=torch.bool)
    rowptr, col = tree.rowptr.long(), tree.col.long()
    for number, choice in enumerate(walk[: max(_RING_SIZES) - 1]):
        moving = number < steps
        degree = rowptr[at + 1] - rowptr[at]
        others = degree - (before >= 0).long()
        stuck |= moving & (others < 1)
        entry = rowptr[at] + (choice * others.clamp(min=1)).long()
        following = col[entry.clamp(max=col.numel() - 1)]
        # The choice is among the first entries; where it meets the way back, the last entry takes its place.
        following = torch.where(following == before, col[(rowptr[at + 1] - 1).clamp(min=0)], following)
        going = moving & ~stuck
        before, at = torch.where(going, at, before), torch.where(going, following, at)
    other = first + (walk[0] * (n - 1).clamp(min=1)).long()
    other = other + (other >= here).long()
    far = torch.where(steps > 0, at, other)
    low, high = torch.minimum(here, far), torch.maximum(here, far)
    possible = ~stuck & (n > 2) & ~_are_adjacent(tree, low, high)
    draw = torch.where(possible, torch.arange(_RING_DRAWS), _RING_DRAWS).amin(1)
    found = draw < _RING_DRAWS
    pick = draw[found][:, None]
    low, high = low[found].gather(1, pick).squeeze(1), high[found].gather(1, pick).squeeze(1)
    key = torch.unique(low * tree.num_nodes + high)
    return torch.stack([key // tree.num_nodes, key % tree.num_nodes])


def _are_adjacent(edges: EdgeSample, row: torch.Tensor, col: torch.Tensor) -> torch.Tensor:
    """Whether each pair is an edge: a binary search among the sorted entries."""
    keys = edges.row() * edges.num_nodes + edges.col.long()
    wanted = row * edges.num_nodes + col
    return keys[torch.searchsorted(keys, wanted).clamp(max=keys.numel() - 1)] == wanted


def random_graphs(
    sizes: Sequence[int],
    mean_degree: float,
    seed: int,
    *,
    graph_ids: Sequence[int] | None = None,
    device: torch.device | str = "cpu",
) -> EdgeSample:
    """Erdos-Renyi graphs at a mean degree: every pair with probability mean_degree / (n - 1), at most 1.

    The baseline of graph-free distillation. Time O(pairs).

    Args:
        sizes: nodes of each graph, each at least 1.
        mean_degree: expected partners of a node, 0 or more.
        seed, graph_ids, device: as in :func:`random_trees`.

    Raises:
        InputError: a negative mean degree, or bad sizes or ids.
    """
    check(mean_degree >= 0.0, "mean_degree", "a number of partners, 0 or more", mean_degree)
    layout = PairLayout.complete(sizes, graph_ids=graph_ids, device=device)
    n = layout.node_ptr[1:] - layout.node_ptr[:-1]
    logit = torch.logit((mean_degree / (n - 1).clamp(min=1)).clamp(max=1.0).float())
    pairs = layout.pair_ptr[1:] - layout.pair_ptr[:-1]
    drawn = sample_edges(logit.repeat_interleave(pairs, output_size=layout.num_pairs), layout, seed=seed)
    return EdgeSample(drawn.rowptr, drawn.col, drawn.value, drawn.ptr, symmetric=True)


def random_features(
    kind: str,
    num_features: int,
    num_nodes: int,
    *,
    seed: int,
    edges: EdgeSample | None = None,
    shares: Sequence[float] | None = None,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Node features to start from, float32 [num_nodes, num_features].

    Args:
        kind: "one-hot" (labels by `shares`), "continuous" (independent N(0, 1)), "constant" (ones) or
            "degree" (one-hot degrees of `edges`, the last label standing for all higher ones).
        num_features: columns, at least 1.
        num_nodes: rows.
        seed: of a generator of its own; the global random state is left alone.
        edges: the graphs, needed for "degree".
        shares: of each label of "one-hot"; default all equal.
        device: where the features shall live.

    Raises:
        InputError: unknown kind, no columns, another number of shares, or "degree" without edges of `num_nodes` nodes.
    """
    check_choice("kind", kind, FEATURE_KINDS)
    check(num_features >= 1, "num_features", "at least 1 column", num_features)
    check(num_nodes >= 0, "num_nodes", "a number of rows", num_nodes)
    if kind == "constant":
        return torch.ones(num_nodes, num_features, device=device)
    if kind == "continuous":
        return torch.randn(num_nodes, num_features, generator=_generator(seed)).to(device)
    if kind == "one-hot":
        if shares is None:
            label = torch.randint(num_features, (num_nodes,), generator=_generator(seed))
        else:
            check(len(shares) == num_features, "label_shares", f"{num_features}, one per feature column", len(shares))
            weights = torch.tensor(shares, dtype=torch.float64)
            label = torch.multinomial(weights, num_nodes, replacement=True, generator=_generator(seed))
        return torch.nn.functional.one_hot(label, num_features).float().to(device)
    if edges is None or edges.num_nodes != num_nodes:
        got = "none" if edges is None else f"{edges.num_nodes} nodes"
        raise InputError(f"edges: expected edges of {num_nodes} nodes for kind 'degree', got {got}")
    return degree_features(edges, num_features - 1).to(device)


def _generator(seed: int) -> torch.Generator:
    check(isinstance(seed, int) and -(2**63) <= seed < 2**64, "seed", "an integer of 64 bits", seed)
    return torch.Generator().manual_seed(seed)
