"""Start graphs for a run: what learning and refinement set out from, and the random baseline."""

from __future__ import annotations

from ..errors import check
from ..graphs import EdgeSample, GraphBatch
from ..pseudo_graphs import GraphPrior
from ..teachers import Teacher
from .starts import balanced_labels, random_features, random_graphs, random_trees, sample_sizes


def start_graphs(teacher: Teacher, prior: GraphPrior, num_graphs: int, *, seed: int = 0) -> GraphBatch:
    """Sparse connected random graphs with random features and balanced labels.

    Args:
        teacher: gives the feature width and the classes.
        prior: sizes, mean degree and kind of features.
        num_graphs: at least 1.
        seed: seed of everything drawn.

    Returns:
        GraphBatch with labels; trees with some rings, of about the prior's mean degree (never below a
        tree's).
    """
    sizes = _sizes(prior, num_graphs, seed)
    # A tree of n nodes has n - 1 edges; what the mean degree asks beyond that closes rings.
    extra = max(prior.expected_degree / 2.0 - 1.0 + 1.0 / (sum(sizes) / len(sizes)), 0.0)
    return _finish(teacher, prior, random_trees(sizes, extra_edges=extra, seed=seed), seed)


def random_pool(teacher: Teacher, prior: GraphPrior, num_graphs: int, *, seed: int = 0) -> GraphBatch:
    """Erdos-Renyi graphs of the prior's mean degree: the baseline that every run must beat."""
    sizes = _sizes(prior, num_graphs, seed)
    return _finish(teacher, prior, random_graphs(sizes, prior.expected_degree, seed), seed)


def _sizes(prior: GraphPrior, num_graphs: int, seed: int) -> tuple[int, ...]:
    check(num_graphs >= 1, "num_graphs", "at least 1", num_graphs)
    return sample_sizes((prior.min_nodes, prior.max_nodes), num_graphs, seed)


def _finish(teacher: Teacher, prior: GraphPrior, edges: EdgeSample, seed: int) -> GraphBatch:
    x = random_features(
        prior.feature_kind, teacher.num_features, edges.num_nodes, seed=seed, edges=edges, shares=prior.label_shares
    )
    return GraphBatch(x, edges, balanced_labels(edges.num_graphs, teacher.num_classes, seed))
