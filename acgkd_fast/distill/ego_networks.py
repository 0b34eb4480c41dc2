"""Start graphs like those of people who appear, write or work together: one who knows all, and groups."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..graphs import EdgeSample
from ..layout import PairLayout
from ..philox import Stream, graph_uniforms
from .starts import per_graph

# Halvings of a threshold among uniforms that are 2^-23 apart.
_HALVINGS = 24


def random_ego_networks(
    sizes: Sequence[int],
    mean_degree: float | torch.Tensor,
    seed: int,
    *,
    graph_ids: Sequence[int] | None = None,
    device: torch.device | str = "cpu",
) -> EdgeSample:
    """Ego networks: the first node of a graph knows all others, who fall into groups in which all know each other.

    Where a graph is cut into groups is random, how often follows from its mean degree: groups are split at random
    places until it is reached as nearly as they allow. The least is a star, of mean degree 2 - 2 / n, the most a
    complete graph.

    Args:
        sizes: nodes of each graph, each at least 1.
        mean_degree: partners of a node, 0 or more; one number or a tensor [B], one for each graph.
        seed: 64-bit key.
        graph_ids: distinct ids that address the noise; default 0..B-1. A graph depends on its id, size and mean degree
            alone.
        device: where the edges shall live. They are drawn on the CPU.

    Returns:
        EdgeSample of symmetric, simple, connected graphs with weights 1.

    Raises:
        InputError: a negative mean degree, or bad sizes or ids.
    """
    degrees = per_graph("mean_degree", mean_degree, len(sizes), "partners")
    layout = PairLayout.complete(sizes, graph_ids=graph_ids)
    ptr, ids = layout.node_ptr, layout.table[2, :-1]
    n = ptr[1:] - ptr[:-1]
    graph = torch.arange(n.numel()).repeat_interleave(n)
    place = torch.arange(graph.numel()) - ptr[graph]
    u = graph_uniforms(ids[graph], place, 1, stream=Stream.INIT, seed=seed).squeeze(-1)

    def groups(threshold: torch.Tensor) -> torch.Tensor:
        """Number of the group of every node; an ego is one of its own, and so is what follows it or is cut off."""
        return ((place <= 1) | (u < threshold[graph])).cumsum(0) - 1

    def missing(threshold: torch.Tensor) -> torch.Tensor:
        """Ends of edges [B] that a graph so cut has less than asked."""
        group = groups(threshold)
        others = torch.where(place > 0, torch.bincount(group)[group] - 1, 0).double()
        within = torch.zeros(n.numel(), dtype=torch.float64).index_add_(0, graph, others)
        return degrees * n - within - 2.0 * (n - 1)

    # More cuts, fewer edges: from no group cut to all of them.
    low, high = torch.zeros_like(degrees), torch.ones_like(degrees)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2.0
        enough = missing(middle) <= 0.0
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    nearest = torch.where(missing(low).abs() <= missing(high).abs(), low, high)
    group = groups(nearest)

    members = torch.bincount(group)
    first = members.cumsum(0) - members
    # Every node is joined with those of its group that come after it, and the ego with all.
    after = torch.where(place > 0, (first + members)[group] - torch.arange(group.numel()) - 1, n[graph] - 1)
    one = torch.arange(group.numel()).repeat_interleave(after)
    two = one + 1 + torch.arange(one.numel()) - (after.cumsum(0) - after)[one]
    pairs = torch.stack([torch.cat([one, two]), torch.cat([two, one])])
    return EdgeSample.from_edge_index(pairs, ptr, symmetric=True).to(device)
