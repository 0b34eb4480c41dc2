"""Pools without a search: random graphs drawn anew, balanced ones, and inverted features on random structure."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..distill.objectives import batch_norm_term, one_hot_entropy
from ..distill.pool import random_pool
from ..distill.statistics import MomentsProbe
from ..distill.student import teacher_logits
from ..errors import check
from ..graphs import GraphBatch
from ..pseudo_graphs import GraphPrior
from ..teachers import Teacher

Pool = GraphBatch | Callable[[int], GraphBatch]

# Draws of a pool's size that a balanced pool may look through before it takes what it has.
_MOST_DRAWS = 20
# Seeds of fresh draws lie far from those that runs count up from.
_FRESH = 1_000_003


def random_pools(teacher: Teacher, prior: GraphPrior, num_graphs: int, *, seed: int = 0) -> Callable[[int], GraphBatch]:
    """Random graphs drawn anew every epoch: a function of the epoch; see :func:`acgkd_fast.random_pool`."""
    return lambda epoch: random_pool(teacher, prior, num_graphs, seed=_fresh_seed(seed, epoch))


def balanced_random_pool(teacher: Teacher, prior: GraphPrior, num_graphs: int, *, seed: int = 0) -> GraphBatch:
    """Random graphs of which the teacher puts equally many into every class.

    Args:
        teacher, prior, num_graphs, seed: as in :func:`acgkd_fast.random_pool`.

    Returns:
        GraphBatch labelled with the teacher's answers. A class that the teacher finds too rarely among 20
        times `num_graphs` draws gets as many graphs as were found, and the pool is smaller by the rest.

    Raises:
        InputError: fewer than one graph.
    """
    check(num_graphs >= 1, "num_graphs", "at least 1", num_graphs)
    classes = teacher.num_classes
    wanted = [num_graphs // classes + (k < num_graphs % classes) for k in range(classes)]
    found: list[GraphBatch] = []
    for draw in range(_MOST_DRAWS):
        graphs = random_pool(teacher, prior, num_graphs, seed=_fresh_seed(seed, draw))
        answers = teacher_logits(teacher, graphs).argmax(1)
        keep = []
        for k in range(classes):
            chosen = (answers == k).nonzero().squeeze(1)[: wanted[k]]
            wanted[k] -= chosen.numel()
            keep.append(chosen)
        kept = torch.cat(keep)
        if kept.numel():
            part = graphs.select(kept)
            found.append(GraphBatch(part.x, part.edges, answers[kept]))
        if not any(wanted):
            break
    return GraphBatch.concatenate(found)


def inverted_features(
    teacher: Teacher,
    prior: GraphPrior,
    num_graphs: int,
    *,
    steps: int = 400,
    lr: float = 0.05,
    c_bn: float = 0.1,
    c_oh: float = 0.01,
    seed: int = 0,
) -> GraphBatch:
    """DeepInversion on graphs: features learned by gradient, random structure kept.

    Minimises CE + c_bn R_bn + c_oh H(X) over the features by Adam; categorical features are a
    softmax while learning and one-hot in the result. Constant features leave nothing to learn.

    Args:
        teacher: stays frozen.
        prior, num_graphs, seed: of the random graphs, see :func:`acgkd_fast.random_pool`.
        steps, lr: of Adam.
        c_bn, c_oh: weights of the BatchNorm term and of the one-hot entropy.

    Returns:
        GraphBatch with balanced labels.

    Raises:
        InputError: fewer than one graph, or steps below 0.

    Source: Yin et al., arXiv 1912.08795, as a baseline in GFKD, arXiv 2105.07519.
    """
    check(steps >= 0, "steps", "0 or more", steps)
    graphs = random_pool(teacher, prior, num_graphs, seed=seed)
    if prior.feature_kind == "constant" or steps == 0:
        return graphs
    assert graphs.y is not None
    categorical = prior.feature_kind in ("one-hot", "degree")
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(graphs.x.shape, generator=generator).to(graphs.x).requires_grad_()
    optimizer = torch.optim.Adam([features], lr=lr)
    for _ in range(steps):
        x = features.softmax(-1) if categorical else features
        with MomentsProbe(teacher.module) as probe:
            logits = teacher(GraphBatch(x, graphs.edges, graphs.y))
        loss = torch.nn.functional.cross_entropy(logits, graphs.y) + c_bn * batch_norm_term(probe)
        if categorical:
            loss = loss + c_oh * one_hot_entropy(x)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    x = features.detach()
    if categorical:
        x = torch.nn.functional.one_hot(x.argmax(-1), x.shape[1]).to(x.dtype)
    return GraphBatch(x, graphs.edges, graphs.y)


def _fresh_seed(seed: int, draw: int) -> int:
    return seed * _FRESH + draw + 1
