"""Start graphs for a run: what learning and refinement set out from, and the random baseline."""

from __future__ import annotations

import torch

from ..errors import check
from ..graphs import EdgeSample, GraphBatch
from ..pseudo_graphs import GraphPrior
from ..teachers import Teacher
from .ego_networks import random_ego_networks
from .starts import (
    balanced_labels,
    prior_degrees,
    prior_sizes,
    random_features,
    random_graphs,
    random_trees,
)

_HALVINGS = 50


def start_graphs(teacher: Teacher, prior: GraphPrior, num_graphs: int, *, seed: int = 0) -> GraphBatch:
    """Sparse connected random graphs with random features and balanced labels.

    Args:
        teacher: gives the feature width and the classes.
        prior: sizes, mean degree, hubs and kind of features.
        num_graphs: at least 1.
        seed: seed of everything drawn.

    Returns:
        GraphBatch with labels; trees with some rings, or ego networks, of about the prior's mean degree (never below a
        tree's).
    """
    sizes = _sizes(prior, num_graphs, seed)
    degrees = prior_degrees(prior, sizes)
    if prior.ego_networks:
        edges = random_ego_networks(sizes, degrees, seed)
    else:
        extra = _beyond_trees(degrees, torch.tensor(sizes, dtype=torch.float64))
        hubs = _hub_shares(prior.hub_share or 0.0, num_graphs, seed)
        edges = random_trees(sizes, extra_edges=extra, hub_share=hubs, seed=seed)
    return _finish(teacher, prior, edges, seed)


def _hub_shares(mean: float, count: int, seed: int) -> torch.Tensor:
    """Hub shares between 0 and 1 whose mean is as stated, float64 [count]: U^((1 - mean) / mean), evenly at 1/2.

    Some threads are answers to one question and some are conversations. U are (i + 1/2) / count in random order.
    """
    if mean == 0.0:
        return torch.zeros(count, dtype=torch.float64)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return ((order + 0.5) / count) ** ((1.0 - mean) / mean)


def _beyond_trees(degrees: torch.Tensor, nodes: torch.Tensor) -> torch.Tensor:
    """Edges per node that close rings, [B]: what mean degrees ask beyond a tree of average size.

    A graph that asks for less than a tree gets a tree; the others then get less, so that the average stays.
    """
    tree = 1.0 - len(nodes) / nodes.sum()
    wanted = ((degrees / 2.0 - tree) * nodes).sum().clamp(min=0.0)
    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2.0
        asked = ((middle * degrees / 2.0 - tree).clamp(min=0.0) * nodes).sum()
        low, high = (low, middle) if asked > wanted else (middle, high)
    return (high * degrees / 2.0 - tree).clamp(min=0.0)


def random_pool(teacher: Teacher, prior: GraphPrior, num_graphs: int, *, seed: int = 0) -> GraphBatch:
    """Erdos-Renyi graphs of the prior's sizes and mean degrees: the baseline that every run must beat."""
    sizes = _sizes(prior, num_graphs, seed)
    return _finish(teacher, prior, random_graphs(sizes, prior_degrees(prior, sizes), seed), seed)


def _sizes(prior: GraphPrior, num_graphs: int, seed: int) -> tuple[int, ...]:
    check(num_graphs >= 1, "num_graphs", "at least 1", num_graphs)
    return prior_sizes(prior, num_graphs, seed)


def _finish(teacher: Teacher, prior: GraphPrior, edges: EdgeSample, seed: int) -> GraphBatch:
    x = random_features(
        prior.feature_kind, teacher.num_features, edges.num_nodes, seed=seed, edges=edges, shares=prior.label_shares
    )
    return GraphBatch(x, edges, balanced_labels(edges.num_graphs, teacher.num_classes, seed))
