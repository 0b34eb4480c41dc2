"""Start graphs for a run: what learning and refinement set out from, and the random baseline."""

from __future__ import annotations

import torch

from ..errors import check
from ..graphs import EdgeSample, GraphBatch
from ..philox import Stream, graph_uniforms
from ..pseudo_graphs import GraphPrior
from ..teachers import Teacher
from .ego_networks import random_ego_networks
from .starts import balanced_labels, prior_degrees, prior_sizes, random_features, random_graphs, random_trees
from .student import teacher_logits

_HALVINGS = 50


def start_graphs(teacher: Teacher, prior: GraphPrior, num_graphs: int, *, seed: int = 0) -> GraphBatch:
    """Sparse connected random graphs, or ego networks, with random features and balanced labels.

    Args:
        teacher: gives the feature width and the classes.
        prior: sizes, mean degree, hubs, ego networks and kind of features.
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

    Some threads are answers to one question and some are conversations. U takes each of `count` equal parts of (0, 1)
    once, in random order, and a graph gets the mean of its part.
    """
    if mean == 0.0:
        return torch.zeros(count, dtype=torch.float64)
    bounds = (torch.arange(count + 1, dtype=torch.float64) / count) ** (1.0 / mean)
    # Not the order that shuffles sizes, or the largest graphs would have the strongest hubs.
    words = graph_uniforms(torch.arange(count), torch.zeros((), dtype=torch.int64), 2, stream=Stream.SHUFFLE, seed=seed)
    return (count * mean * bounds.diff()).clamp(max=1.0)[words[:, 1].argsort()]


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


def divide_starts(teacher: Teacher, start: GraphBatch, share: float, *, seed: int = 0) -> tuple[GraphBatch, GraphBatch]:
    """Start graphs to be searched, with labels to be met, and the last `share` of them, with the teacher's answers.

    Nobody makes graphs that stay as they are fit the labels that they were dealt; those of the others are dealt anew,
    so that every class occurs equally often among them.
    """
    order = torch.arange(start.num_graphs)
    searched = len(order) - round(share * len(order))
    if searched == len(order):
        return start, start.select(order[:0])
    rest, stay = start.select(order[:searched]), start.select(order[searched:])
    labels = balanced_labels(searched, teacher.num_classes, seed)
    answers = teacher_logits(teacher, stay).argmax(1)
    return GraphBatch(rest.x, rest.edges, labels), GraphBatch(stay.x, stay.edges, answers)


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
