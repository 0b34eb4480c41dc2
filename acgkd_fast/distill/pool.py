"""Start graphs for a run: what learning and refinement set out from, and the random baseline."""

from __future__ import annotations

from ..errors import check
from ..graphs import EdgeSample, GraphBatch
from ..pseudo_graphs import GraphPrior
from ..teachers import Teacher
from .starts import balanced_labels, prior_degrees, prior_sizes, random_features, random_graphs, random_trees


def start_graphs(teacher: Teacher, prior: GraphPrior, num_graphs: int, *, seed: int = 0) -> GraphBatch:
    """Sparse connected random graphs with random features and balanced labels.

    Args:
        teacher: gives the feature width and the classes.
        prior: sizes, mean degree, hubs and kind of features.
        num_graphs: at least 1.
        seed: seed of everything drawn.

    Returns:
        GraphBatch with labels; trees with some rings, of about the prior's mean degree (never below a
        tree's).
    """
    sizes = _sizes(prior, num_graphs, seed)
    # A tree of n nodes has n - 1 edges; what the mean degree asks beyond that closes rings.
    extra = (prior_degrees(prior, sizes) / 2.0 - 1.0 + len(sizes) / sum(sizes)).clamp(min=0.0)
    edges = random_trees(sizes, extra_edges=extra, hub_share=prior.hub_share or 0.0, seed=seed)
    return _finish(teacher, prior, edges, seed)


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
