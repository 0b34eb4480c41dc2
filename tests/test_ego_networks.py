"""Start graphs of one who knows all, and groups in which all know each other."""

from __future__ import annotations

import re

import pytest
import torch

from acgkd_fast.distill.ego_networks import random_ego_networks
from acgkd_fast.distill.pool import start_graphs
from acgkd_fast.errors import InputError
from acgkd_fast.nn.models import build_model
from acgkd_fast.pseudo_graphs import GraphPrior
from acgkd_fast.teachers import as_teacher

SIZES = [1, 2, 3, 7, 25, 40, 64, 65]


def matrices(sizes, degree, seed=3, **options):
    """Adjacency matrices, one per graph."""
    edges = random_ego_networks(sizes, degree, seed, **options)
    dense = torch.zeros(edges.num_nodes, edges.num_nodes)
    dense[edges.row(), edges.col[: edges.num_edges].long()] = 1.0
    assert edges.symmetric and int(dense.sum()) == edges.num_edges and bool((edges.value == 1.0).all())
    blocks = [dense[a:b, a:b] for a, b in zip(edges.ptr.tolist(), edges.ptr.tolist()[1:], strict=False)]
    assert sum(int(block.sum()) for block in blocks) == edges.num_edges
    return blocks


@pytest.mark.parametrize("degree", [0.0, 2.5, 6.0, 17.0, 1000.0])
def test_one_knows_all_and_groups_know_each_other(degree):
    for a in matrices(SIZES, degree):
        n = a.shape[0]
        assert torch.equal(a, a.T) and not a.diagonal().any()
        assert bool((a[0, 1:] == 1.0).all())
        # Friends of a friend are friends, but for the ego: a union of complete graphs.
        others = a[1:, 1:] + torch.eye(n - 1)
        assert torch.equal((others @ others > 0).float(), others)


def test_degrees_are_as_near_as_groups_allow():
    several = matrices([30] * 400, 9.0)
    means = torch.tensor([a.sum(1).mean() for a in several])
    assert means.mean() == pytest.approx(9.0, abs=0.3) and means.std() < 1.0
    groups = {tuple(sorted(a[1:].sum(1).tolist())) for a in several}
    assert len(groups) > 200
    each = torch.tensor([3.0, 8.0, 20.0])
    means = [a.sum(1).mean().item() for a in matrices([40] * 3, each)]
    assert means == pytest.approx(each.tolist(), rel=0.3)


@pytest.mark.parametrize("n", [1, 2, 3, 30])
def test_from_stars_to_complete_graphs(n):
    (star,), (complete,) = matrices([n], 0.0), matrices([n], n - 1.0)
    assert star.sum() == 2 * (n - 1) and complete.sum() == n * (n - 1)


def test_repeat_and_independence_of_the_batch():
    ids = [4, 900, 2**32 - 1, 0]
    sizes, degrees = [7, 12, 30, 25], torch.tensor([2.0, 5.0, 9.0, 4.0])
    together = matrices(sizes, degrees, graph_ids=ids)
    for order in ([3, 2, 1, 0], [2], [1, 3]):
        again = matrices([sizes[g] for g in order], degrees[order], graph_ids=[ids[g] for g in order])
        assert all(torch.equal(a, together[g]) for a, g in zip(again, order, strict=True))
    assert not torch.equal(matrices([30], 9.0, seed=4, graph_ids=[ids[2]])[0], together[2])
    assert matrices([], 3.0) == []


def test_pools_of_ego_networks_have_their_degrees_as_features():
    teacher = as_teacher(build_model("gcn3-8", 64, 2))
    prior = GraphPrior.around(
        20, mean_degree=9.9, feature_kind="degree", size_spread=0.5, degree_growth=1.0, ego_networks=True
    )
    pool = start_graphs(teacher, prior, 300, seed=1)
    degrees = pool.edges.rowptr.diff().long()
    assert pool.edges.num_edges / pool.num_nodes == pytest.approx(9.9, abs=0.5)
    assert torch.equal(pool.x.argmax(1), degrees.clamp(max=63))
    assert torch.equal(degrees[pool.ptr[:-1]], pool.sizes - 1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: random_ego_networks([3], -1.0, 0), "mean_degree: expected a finite number of partners, 0 or more"),
        (lambda: random_ego_networks([3, 4], torch.ones(3), 0), "mean_degree: expected a finite number of partners"),
        (lambda: random_ego_networks([0], 1.0, 0), "sizes: expected at least 1 node"),
        (lambda: random_ego_networks([3, 3], 1.0, 0, graph_ids=[1, 1]), "graph_ids: expected distinct ids"),
        (lambda: GraphPrior(ego_networks=1), "ego_networks: expected None, True or False"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(InputError, match=re.escape(message)):
        call()
