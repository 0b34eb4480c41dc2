"""Start graphs for the search: sparse and connected, or random at a given density.

Density is what the search cannot repair, because degree normalisation hides it from the teacher.
Sparse connected starts are therefore the default, and :func:`random_graphs` is the baseline that
every result must beat.

All graphs of a batch grow at once. Structure comes from the package's random stream (``Stream.INIT``
and ``Stream.EDGE``), addressed by graph id: a graph does not depend on its neighbours in the batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from ..data import degree_features
from ..edges import sample_edges
from ..errors import InputError, check, check_choice, is_number
from ..graphs import EdgeSample
from ..layout import PairLayout
from ..philox import Stream, graph_uniforms
from ..pseudo_graphs import FEATURE_KINDS, MOST_SPREAD, GraphPrior

# Parents are drawn in proportion to degree and accepted with chance degree^(attachment - 1); about
# two draws in three pass, so that sixteen failures in a row (the last draw then stands) are one in 10^7.
_PARENT_DRAWS = 16
# A walk that runs into a leaf closes no ring and is tried again.
_RING_DRAWS = 16
_RING_LANES = 8
_RING_SIZES = (3, 4, 5, 6)
# Extra edges use step words that no node position reaches.
_EXTRA_STEP = 2**31
# Where the walks of all slots fail, or two of them end at one pair, the next round tries again with fresh words.
_ROUNDS = 16
_ROUND_STEP = 2**26
# Of lognormal sizes.
_LEAST_NODES = 3
_DRAWS_AT_ONCE = 2**18


def sample_sizes(prior: tuple[int, int], count: int, seed: int, *, spread: float = 0.0) -> tuple[int, ...]:
    """Node counts of `count` graphs.

    Args:
        prior: (low, high), both included.
        count: how many.
        seed: of a generator of its own.
        spread: 0 for uniform on low..high. Above 0 the counts are lognormal and may leave the range: of mean
            (low + high) / 2 and with this standard deviation as a share of it, 3 nodes or more. They are the quantiles
            at (i + 1/2) / count in random order, so that a small batch has its large graphs too; few of them fall short
            of mean and deviation, the more the wider they spread.

    Raises:
        InputError: an empty range, sizes below 1, a negative count or spread.
    """
    check(len(prior) == 2 and 1 <= prior[0] <= prior[1], "prior", "(low, high) with 1 <= low <= high", prior)
    check(count >= 0, "count", "a number of graphs", count)
    check(is_number(spread) and 0.0 <= spread <= MOST_SPREAD, "spread", f"a number in [0, {MOST_SPREAD:g}]", spread)
    generator = _generator(seed)
    if spread == 0.0:
        return tuple(torch.randint(prior[0], prior[1] + 1, (count,), generator=generator).tolist())
    variance = math.log1p(spread * spread)
    middle = math.log((prior[0] + prior[1]) / 2.0) - variance / 2.0
    normal = torch.special.ndtri((torch.arange(count, dtype=torch.float64) + 0.5) / max(count, 1))
    drawn = (middle + variance**0.5 * normal).exp().round().clamp(min=_LEAST_NODES).long()
    return tuple(drawn[torch.randperm(count, generator=generator)].tolist())


def prior_sizes(prior: GraphPrior, count: int, seed: int) -> tuple[int, ...]:
    """Node counts of `count` graphs as a prior describes them, see :func:`sample_sizes`."""
    return sample_sizes((prior.min_nodes, prior.max_nodes), count, seed, spread=prior.size_spread or 0.0)


def prior_degrees(prior: GraphPrior, sizes: Sequence[int]) -> torch.Tensor:
    """Mean degree of graphs of these sizes, float64 [B]: the prior's in turn, on the average over all nodes."""
    nodes = torch.tensor(sizes, dtype=torch.float64)
    growth = nodes ** (prior.degree_growth or 0.0)
    degrees = torch.tensor(prior.degrees, dtype=torch.float64)[torch.arange(len(sizes)) % len(prior.degrees)]
    return growth * (degrees * (nodes.sum() / (nodes * growth).sum()))


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
    extra_edges: float | torch.Tensor = 0.08,
    attachment: float = 0.5,
    hub_share: float | torch.Tensor = 0.0,
    seed: int,
    graph_ids: Sequence[int] | None = None,
    device: torch.device | str = "cpu",
) -> EdgeSample:
    """Sparse connected graphs: random trees plus a few edges that close rings.

    Node t joins an earlier node: with chance `hub_share` the graph's first, else one that is chosen with weight
    degree^attachment. Then `extra_edges` * n edges, rounded at random, close a ring of 3, 4, 5 or 6 nodes or join any
    pair, each kind being as likely as the others where the graph has room for it (a star has none but triangles),
    which gives a mean degree of about 2 (1 + extra_edges) - 2 / n.

    Args:
        sizes: nodes of each graph, each at least 1.
        extra_edges: edges beyond the tree, per node; 0 or more, one number or a tensor [B]. Fewer are placed
            where a graph has no room for them, and now and then in graphs that are nearly complete.
        attachment: exponent of the degree, in [0, 1]; 0 is a uniform parent, 1 preferential attachment.
        hub_share: chance that a node joins the first node of its graph, in [0, 1], one number or a tensor [B]; 1 grows
            stars.
        seed: 64-bit key.
        graph_ids: distinct ids that address the noise; default 0..B-1.
        device: where the edges shall live. They are drawn on the CPU.

    Returns:
        EdgeSample of symmetric, simple graphs with weights 1.

    Raises:
        InputError: an argument outside its range, naming it.
    """
    extra = per_graph("extra_edges", extra_edges, len(sizes), "edges per node")
    check(0.0 <= attachment <= 1.0, "attachment", "an exponent in [0, 1]", attachment)
    hubs = per_graph("hub_share", hub_share, len(sizes), "shares", most=1.0)
    layout = PairLayout.complete(sizes, graph_ids=graph_ids)
    ptr, ids = layout.node_ptr, layout.table[2, :-1]
    parent = _grow(ptr, ids, attachment, hubs, seed)
    child = (parent >= 0).nonzero().squeeze(1)
    pairs = torch.stack([parent[child], child])
    grown = EdgeSample.from_edge_index(torch.cat([pairs, pairs.flip(0)], 1), ptr, symmetric=True)
    n = ptr[1:] - ptr[:-1]
    rounding = graph_uniforms(ids, torch.zeros((), dtype=torch.int64), 1, stream=Stream.INIT, seed=seed).squeeze(-1)
    room = (n - 1) * (n - 2) // 2
    wanted = (extra * n + rounding).minimum(room).long()
    for number in range(_ROUNDS):
        # Not before all graphs are done: what one of them gets may not depend on the others.
        if not wanted.any():
            break
        closing = _close_rings(grown, ids, wanted, seed, number)
        wanted = wanted - torch.bincount(torch.bucketize(closing[0], ptr[1:], right=True), minlength=n.numel())
        pairs = torch.cat([pairs, closing], 1)
        grown = EdgeSample.from_edge_index(torch.cat([pairs, pairs.flip(0)], 1), ptr, symmetric=True)
    return grown.to(device)


def _grow(ptr: torch.Tensor, ids: torch.Tensor, attachment: float, hub_share: torch.Tensor, seed: int) -> torch.Tensor:
    """Parent of every node as a node number of the batch, -1 for the first node of each graph."""
    parent = torch.full((int(ptr[-1]),), -1)
    # A node counts its own edge to its parent from the start; nobody looks at it before it has joined.
    degree = torch.ones_like(parent)
    # Largest first, so that the graphs still growing are a prefix.
    sizes, order = (ptr[1:] - ptr[:-1]).sort(descending=True)
    base, ids, hub_share = ptr[:-1][order], ids[order], hub_share[order]
    parent[(base + 1)[sizes > 1]] = base[sizes > 1]
    at_least = torch.bincount(sizes).flip(0).cumsum(0).flip(0).tolist()  # [t]: graphs of t nodes and more
    draws, one = torch.arange(_PARENT_DRAWS), torch.ones_like(parent)
    position = 2
    while position < len(at_least) - 1:
        growing = at_least[position + 1]
        stop = min(len(at_least) - 1, position + max(1, _DRAWS_AT_ONCE // (growing * 2 * _PARENT_DRAWS)))
        t = torch.arange(position, stop)[:, None]
        u = graph_uniforms(ids[:growing], t, 2 * _PARENT_DRAWS + 1, stream=Stream.INIT, seed=seed)
        end, accept = u[..., :_PARENT_DRAWS], u[..., _PARENT_DRAWS : 2 * _PARENT_DRAWS]
        to_hub = u[..., -1] < hub_share[:growing]
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
            chosen = torch.where(to_hub[k, :growing], base[:growing], candidate.gather(1, draw).squeeze(1))
            parent[base[:growing] + (position + k)] = chosen
            degree.index_add_(0, chosen, one[:growing])
        position = stop
    return parent


def _close_rings(grown: EdgeSample, ids: torch.Tensor, wanted: torch.Tensor, seed: int, number: int) -> torch.Tensor:
    """Edges [2, count], lower node first, that are not there yet; none twice, at most `wanted` [B] of each graph."""
    graph = torch.arange(ids.numel()).repeat_interleave(wanted)
    slot = torch.arange(graph.numel()) - (wanted.cumsum(0) - wanted)[graph]
    step = _EXTRA_STEP + number * _ROUND_STEP + slot
    lanes, keys = _RING_DRAWS * _RING_LANES, grown.row() * grown.num_nodes + grown.col.long()
    found = []
    for some in torch.arange(graph.numel()).split(8 * _DRAWS_AT_ONCE // lanes):
        u = graph_uniforms(ids[graph[some]], step[some], lanes, stream=Stream.INIT, seed=seed)
        found.append(_walk(grown, keys, graph[some], u))
    key = torch.unique(torch.cat(found))
    return torch.stack([key // grown.num_nodes, key % grown.num_nodes])


def _walk(grown: EdgeSample, keys: torch.Tensor, graph: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Keys low * num_nodes + high of pairs not among `keys`, at most one per graph listed, whose walks follow u."""
    kind, start, *walk = u.view(-1, _RING_DRAWS, _RING_LANES).unbind(-1)
    # One kind for all tries of a round: drawn anew, the long walks that fail more often would turn into short ones.
    # What fails sixteen times has no room here and becomes another kind in the next round.
    kind = kind[:, :1]

    first, n = grown.ptr[graph][:, None], (grown.ptr[graph + 1] - grown.ptr[graph])[:, None]
    kind = (kind * (len(_RING_SIZES) + 1)).long()
    steps = torch.where(kind < len(_RING_SIZES), kind + _RING_SIZES[0] - 1, 0)
    here = first + (start * n).long()
    # Without immediate return a walk in a tree never comes back, so its length is the distance of its ends. Where rings
    # have been closed it may, and counts as failed.
    before, at = torch.full_like(here, -1), here
    stuck = torch.zeros_like(here, dtype=torch.bool)
    rowptr, col = grown.rowptr.long(), grown.col.long()
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
    key = low * grown.num_nodes + high
    taken = keys[torch.searchsorted(keys, key).clamp(max=keys.numel() - 1)] == key
    possible = ~stuck & (low != high) & ~taken
    draw = torch.where(possible, torch.arange(_RING_DRAWS), _RING_DRAWS).amin(1)
    found = draw < _RING_DRAWS
    return key[found].gather(1, draw[found][:, None]).squeeze(1)


def random_graphs(
    sizes: Sequence[int],
    mean_degree: float | torch.Tensor,
    seed: int,
    *,
    graph_ids: Sequence[int] | None = None,
    device: torch.device | str = "cpu",
) -> EdgeSample:
    """Erdos-Renyi graphs at a mean degree: every pair with probability mean_degree / (n - 1), at most 1.

    The baseline of graph-free distillation. Time O(pairs).

    Args:
        sizes: nodes of each graph, each at least 1.
        mean_degree: expected partners of a node, 0 or more; one number or a tensor [B].
        seed, graph_ids, device: as in :func:`random_trees`.

    Raises:
        InputError: a negative mean degree, or bad sizes or ids.
    """
    degree = per_graph("mean_degree", mean_degree, len(sizes), "partners")
    layout = PairLayout.complete(sizes, graph_ids=graph_ids, device=device)
    n = layout.node_ptr[1:] - layout.node_ptr[:-1]
    logit = torch.logit((degree.to(n.device) / (n - 1).clamp(min=1)).clamp(max=1.0).float())
    pairs = layout.pair_ptr[1:] - layout.pair_ptr[:-1]
    drawn = sample_edges(logit.repeat_interleave(pairs, output_size=layout.num_pairs), layout, seed=seed)
    return EdgeSample(drawn.rowptr, drawn.col, drawn.value, drawn.ptr, symmetric=True)


def per_graph(name: str, given: Any, count: int, what: str, *, most: float = math.inf) -> torch.Tensor:
    """One number for all graphs or one for each, from 0 to `most`: float64 [count] on the CPU."""
    tensor = isinstance(given, torch.Tensor) and given.shape in ((), (count,))
    span = "0 or more" if most == math.inf else f"in [0, {most:g}]"
    expected = f"a finite number of {what}, {span}, or a tensor [{count}] of them"
    check(tensor or is_number(given), name, expected, given)
    values = torch.as_tensor(given, dtype=torch.float64, device="cpu")
    check(bool(((values >= 0.0) & (values <= most) & values.isfinite()).all()), name, expected, given)
    return values.expand(count)


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
