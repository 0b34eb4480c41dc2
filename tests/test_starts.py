"""Start graphs: simple, connected, of the promised density and law, and independent of the batch."""

from __future__ import annotations

import networkx as nx
import pytest
import torch
from helpers import dense, entries, philox_words
from hypothesis import given, settings
from hypothesis import strategies as st

from acgkd_fast import EdgeSample, GraphPrior, InputError, as_teacher, random_pool, start_graphs
from acgkd_fast.distill.pool import _hub_shares
from acgkd_fast.distill.starts import (
    balanced_labels,
    prior_degrees,
    prior_sizes,
    random_features,
    random_graphs,
    random_trees,
    sample_sizes,
)
from acgkd_fast.nn.models import build_model
from acgkd_fast.philox import Stream, graph_uniforms

SIZES = st.lists(st.integers(1, 12), min_size=1, max_size=6)


def graphs_of(edges: EdgeSample) -> list[nx.Graph]:
    """One networkx graph per graph of the batch, nodes numbered from 0."""
    found = []
    for first, stop in zip(edges.ptr[:-1].tolist(), edges.ptr[1:].tolist(), strict=True):
        graph = nx.Graph()
        graph.add_nodes_from(range(stop - first))
        found.append(graph)
    owner = torch.searchsorted(edges.ptr, torch.arange(edges.num_nodes), right=True) - 1
    for row, col, _ in entries(edges):
        assert owner[row] == owner[col], "an edge between two graphs"
        first = int(edges.ptr[owner[row]])
        found[int(owner[row])].add_edge(row - first, col - first)
    return found


def assert_simple(edges: EdgeSample) -> None:
    """No self-loop, no repeated edge, both directions, weights 1, canonical CSR."""
    positions = [(row, col) for row, col, _ in entries(edges)]
    assert positions == sorted(set(positions))
    assert all(row != col and (col, row) in set(positions) for row, col in positions)
    assert edges.symmetric
    assert (edges.value == 1).all()
    assert edges.rowptr.dtype == edges.col.dtype == torch.int32
    assert int(edges.rowptr[-1]) == edges.col.numel()


@settings(max_examples=60, deadline=None)
@given(sizes=SIZES, extra=st.sampled_from([0.0, 0.08, 0.5, 3.0]), attachment=st.sampled_from([0.0, 0.5, 1.0]))
def test_trees_are_simple_and_connected(sizes, extra, attachment):
    edges = random_trees(sizes, extra_edges=extra, attachment=attachment, seed=sum(sizes))
    assert_simple(edges)
    assert edges.ptr.tolist() == [sum(sizes[:k]) for k in range(len(sizes) + 1)]
    for graph, n in zip(graphs_of(edges), sizes, strict=True):
        assert graph.number_of_nodes() == n
        assert nx.is_connected(graph)
        most = min(n * (n - 1) / 2, n - 1 + extra * n + 1)
        assert n - 1 <= graph.number_of_edges() <= most
        if extra == 0.0:
            assert graph.number_of_edges() == n - 1


@pytest.mark.parametrize("n", [10, 20, 60])
def test_mean_degree_is_what_the_docstring_says(n):
    edges = random_trees([n] * 400, seed=1)
    expected = 2 * 1.08 - 2 / n
    # Each of 400 n slots rounds up or down, and a few find no room.
    assert edges.num_edges / edges.num_nodes == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize("attachment", [0.0, 0.5, 1.0])
def test_parents_are_drawn_in_proportion_to_a_power_of_their_degree(attachment):
    count = 6000
    trees = graphs_of(random_trees([4] * count, extra_edges=0.0, attachment=attachment, seed=3))
    # Three nodes always form a path; the fourth joins its middle with chance 2^a / (2 + 2^a), which makes a star.
    stars = sum(max(dict(tree.degree).values()) == 3 for tree in trees) / count
    expected = 2**attachment / (2 + 2**attachment)
    assert stars == pytest.approx(expected, abs=4 * (expected * (1 - expected) / count) ** 0.5)


def test_extra_edges_close_rings_of_three_to_six_about_equally_often():
    trees = graphs_of(random_trees([30] * 3000, extra_edges=1 / 30, seed=5))
    lengths = [len(nx.cycle_basis(tree)[0]) for tree in trees if tree.number_of_edges() == 30]
    assert len(lengths) > 2850
    share = {size: lengths.count(size) / len(lengths) for size in set(lengths)}
    # A fifth each by name, and some more from the fifth that joins any pair.
    assert all(0.18 < share[size] < 0.28 for size in (3, 4, 5, 6)), share
    assert 0.02 < 1 - sum(share[size] for size in (3, 4, 5, 6)) < 0.2


@pytest.mark.parametrize("degree", [2.05, 7.0, 14.0])
def test_dense_graphs_have_the_edges_that_were_asked_for(degree):
    extra = degree / 2 - 1 + 1 / 20
    graphs = graphs_of(random_trees([20] * 60, extra_edges=extra, seed=2))
    exact = 19 + extra * 20
    assert {graph.number_of_edges() for graph in graphs} <= {int(exact), int(exact) + 1}


def test_every_graph_may_ask_for_edges_of_its_own():
    sizes = [10, 12, 3, 40]
    extra = torch.tensor([0.0, 2.5, 5.0, 1.0])
    graphs = graphs_of(random_trees(sizes, extra_edges=extra, seed=2))
    # Three nodes have room for one edge beyond the tree.
    assert [graph.number_of_edges() for graph in graphs] == [9, 11 + 30, 3, 39 + 40]


def test_hubs_draw_the_share_that_was_asked_for():
    trees = graphs_of(random_trees([200] * 40, extra_edges=0.0, hub_share=0.5, attachment=0.0, seed=4))
    # Node t also joins the first by chance, 1 / t of the other half: about 100 + 3 in all.
    degrees = torch.tensor([tree.degree[0] for tree in trees]).double()
    assert degrees.mean() == pytest.approx(102.5, abs=4 * (200 * 0.25 / 40) ** 0.5)
    stars = graphs_of(random_trees([9] * 5, extra_edges=0.0, hub_share=1.0, seed=4))
    assert all(star.degree[0] == 8 for star in stars)
    plain = random_trees([30] * 5, hub_share=0.0, seed=4)
    assert torch.equal(plain.col, random_trees([30] * 5, seed=4).col)


def test_a_prior_says_sizes_and_degrees():
    around = GraphPrior.around(40, mean_degree=6.0, size_spread=0.8, degree_growth=1.0)
    assert (around.min_nodes, around.max_nodes, GraphPrior.around(40).size_spread) == (20, 60, None)
    sizes = torch.tensor(prior_sizes(around, 500, seed=1)).double()
    assert sizes.mean() == pytest.approx(40, rel=0.02) and sizes.std() == pytest.approx(32, rel=0.1)
    assert sizes.min() >= 3 and sizes.max() > 150
    degrees = prior_degrees(around, sizes.long().tolist())
    assert (degrees * sizes).sum() / sizes.sum() == pytest.approx(6.0)
    assert torch.allclose(degrees / sizes, (degrees / sizes)[:1].expand(500))
    in_turn = prior_degrees(GraphPrior(mean_degree=(2.0, 5.0)), [9, 9, 9])
    assert in_turn.tolist() == pytest.approx([2.0, 5.0, 2.0])
    assert GraphPrior(mean_degree=[2.0, 5.0]).expected_degree == 3.5
    flat = prior_degrees(GraphPrior(mean_degree=3.0), [5, 9])
    assert flat.tolist() == pytest.approx([3.0, 3.0])
    assert set(prior_sizes(GraphPrior(10, 12, size_spread=None), 200, seed=0)) == {10, 11, 12}


def test_pools_follow_the_prior():
    teacher = as_teacher(build_model("gcn3-8", 4, 2))
    prior = GraphPrior.around(30, mean_degree=6.0, size_spread=0.6, degree_growth=1.0)
    for pool in (start_graphs(teacher, prior, 200, seed=1), random_pool(teacher, prior, 200, seed=1)):
        assert pool.sizes.tolist() == list(prior_sizes(prior, 200, seed=1))
        assert pool.edges.num_edges / pool.num_nodes == pytest.approx(6.0, abs=0.3)
        edges = pool.edges.rowptr.long()[pool.ptr[1:]] - pool.edges.rowptr.long()[pool.ptr[:-1]]
        large = pool.sizes > 45
        dense_ones = edges[large].sum() / pool.sizes[large].sum()
        assert dense_ones > 1.5 * edges[~large].sum() / pool.sizes[~large].sum()
    hubs = start_graphs(teacher, GraphPrior(30, 30, mean_degree=2.05, hub_share=0.6), 50, seed=1)
    plain = start_graphs(teacher, GraphPrior(30, 30, mean_degree=2.05), 50, seed=1)
    assert hubs.edges.rowptr.diff().max() > 1.3 * plain.edges.rowptr.diff().max()


@pytest.mark.parametrize("spread", [0.5, 1.0])
@pytest.mark.parametrize("mean", [20, 200])
def test_trees_among_growing_degrees_leave_the_mean_as_it_was(mean, spread):
    teacher = as_teacher(build_model("gcn3-8", 4, 2))
    prior = GraphPrior.around(mean, mean_degree=2.1, size_spread=spread, degree_growth=1.0)
    pool = start_graphs(teacher, prior, 300, seed=1)
    assert pool.edges.num_edges / pool.num_nodes == pytest.approx(2.1, abs=0.05)


def test_hubs_differ_from_graph_to_graph():
    teacher = as_teacher(build_model("gcn3-8", 4, 2))
    for mean in (0.5, 0.2):
        prior = GraphPrior(200, 200, mean_degree=1.99, hub_share=mean)
        pool = start_graphs(teacher, prior, 60, seed=1)
        first = pool.edges.rowptr.diff()[pool.ptr[:-1]].double() / 199
        assert first.mean() == pytest.approx(mean, abs=0.05) and first.min() < 0.1 and first.max() > 0.8
    for count, mean in ((1, 0.2), (8, 0.02), (400, 0.5)):
        assert _hub_shares(mean, count, seed=3).mean() == pytest.approx(mean)
    prior = GraphPrior.around(100, mean_degree=1.99, hub_share=0.5, size_spread=0.5)
    pool = start_graphs(teacher, prior, 200, seed=1)
    share = pool.edges.rowptr.diff()[pool.ptr[:-1]] / pool.sizes
    assert torch.corrcoef(torch.stack([share, pool.sizes.float()]))[0, 1].abs() < 0.25
    stars = start_graphs(teacher, GraphPrior(9, 9, mean_degree=1.0, hub_share=1.0), 5, seed=1)
    assert bool((stars.edges.rowptr.diff()[stars.ptr[:-1]] == 8).all())
    each = torch.tensor([0.0, 1.0, 0.5], dtype=torch.float64)
    plain, star, _ = graphs_of(random_trees([30] * 3, extra_edges=0.0, hub_share=each, seed=4))
    assert set(plain.edges) == set(graphs_of(random_trees([30], extra_edges=0.0, seed=4))[0].edges)
    assert all(0 in edge for edge in star.edges)


def test_graphs_do_not_depend_on_their_batch():
    sizes, ids = [7, 12, 1, 30, 5], [4, 900, 2**32 - 1, 0, 17]
    together = graphs_of(random_trees(sizes, extra_edges=2.4, hub_share=0.2, seed=8, graph_ids=ids))
    for order in ([4, 3, 2, 1, 0], [3], [1, 4]):
        chosen = [ids[g] for g in order]
        again = random_trees([sizes[g] for g in order], extra_edges=2.4, hub_share=0.2, seed=8, graph_ids=chosen)
        for graph, other in zip(graphs_of(again), order, strict=True):
            assert set(graph.edges) == set(together[other].edges)
    assert set(graphs_of(random_trees([30], seed=9, graph_ids=[0]))[0].edges) != set(together[3].edges)


def test_long_trees_cross_the_blocks_of_draws():
    # 2^18 draws are enough for 4096 positions of two graphs.
    edges = random_trees([9000, 8500, 3], seed=2)
    assert edges.num_edges / edges.num_nodes == pytest.approx(2.16, abs=0.01)
    # Columns ascend, so the first of a row is its smallest neighbour: an earlier node for all but the three roots.
    smallest = edges.col[edges.rowptr[:-1].long()]
    assert (smallest > torch.arange(edges.num_nodes)).nonzero().flatten().tolist() == edges.ptr[:-1].tolist()


@settings(max_examples=30, deadline=None)
@given(sizes=SIZES, degree=st.sampled_from([0.0, 1.0, 2.5, 100.0]))
def test_random_graphs_are_simple(sizes, degree):
    edges = random_graphs(sizes, degree, seed=4)
    assert_simple(edges)
    graphs_of(edges)
    adjacency = dense(edges)
    if degree == 0.0:
        assert adjacency.sum() == 0
    if degree == 100.0:
        assert adjacency.sum() == sum(n * (n - 1) for n in sizes)


def test_random_graphs_reach_the_mean_degree():
    edges = random_graphs([20] * 300, 2.2, seed=6)
    deviation = (2 * 2 * 2.2 * 0.88 / 6000) ** 0.5
    assert edges.num_edges / 6000 == pytest.approx(2.2, abs=4 * deviation)
    assert torch.equal(edges.col, random_graphs([20] * 300, 2.2, seed=6).col)
    assert not torch.equal(edges.rowptr, random_graphs([20] * 300, 2.2, seed=7).rowptr)


def test_features_of_every_kind():
    edges = random_trees([6, 1, 9], seed=0)
    labels = random_features("one-hot", 5, 4000, seed=1)
    assert ((labels == 0) | (labels == 1)).all() and (labels.sum(1) == 1).all()
    assert labels.mean(0).sub(0.2).abs().max() < 4 * (0.2 * 0.8 / 4000) ** 0.5
    assert torch.equal(random_features("constant", 3, 4, seed=1), torch.ones(4, 3))
    normal = random_features("continuous", 5, 4000, seed=1)
    assert normal.mean().abs() < 0.03 and normal.std().sub(1).abs() < 0.03
    degrees = random_features("degree", 3, 16, seed=1, edges=edges)
    assert torch.equal(degrees.argmax(1), dense(edges).sum(1).clamp(max=2).long())
    assert (degrees.sum(1) == 1).all()
    assert torch.equal(random_features("one-hot", 5, 9, seed=1), random_features("one-hot", 5, 9, seed=1))
    stated = random_features("one-hot", 3, 4000, seed=1, shares=(0.7, 0.3, 0.0))
    assert (stated.sum(1) == 1).all() and stated[:, 2].sum() == 0
    assert stated.mean(0)[0] == pytest.approx(0.7, abs=0.03)
    with pytest.raises(InputError, match="label_shares: expected 3, one per feature column, got 2"):
        random_features("one-hot", 3, 4, seed=1, shares=(0.7, 0.3))
    assert not torch.equal(random_features("one-hot", 5, 9, seed=1), random_features("one-hot", 5, 9, seed=2))


def test_sizes_and_labels():
    sizes = sample_sizes((10, 29), 2000, seed=3)
    assert set(sizes) == set(range(10, 30))
    assert sample_sizes((5, 5), 3, seed=0) == (5, 5, 5)
    assert balanced_labels(10, 3, seed=0).bincount().tolist() == [4, 3, 3]
    assert not torch.equal(balanced_labels(40, 2, seed=0), balanced_labels(40, 2, seed=1))
    assert balanced_labels(0, 2, seed=0).dtype == torch.int64


def test_nothing_touches_the_global_random_state():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    edges = random_trees([8, 3], seed=1)
    random_graphs([8, 3], 2.0, seed=1)
    for kind in ("one-hot", "constant", "continuous", "degree"):
        random_features(kind, 4, 11, seed=1, edges=edges)
    sample_sizes((1, 9), 5, seed=1)
    balanced_labels(5, 2, seed=1)
    assert torch.equal(before, torch.get_rng_state())


def test_graph_uniforms_come_from_the_documented_words():
    ids, steps = torch.tensor([7, 2**32 - 1]), torch.tensor([[0], [5], [2**31 + 3]])
    drawn = graph_uniforms(ids, steps, 6, stream=Stream.INIT, seed=-3)
    assert drawn.shape == (3, 2, 6) and drawn.dtype == torch.float64
    for s, step in enumerate(steps.flatten().tolist()):
        for g, graph in enumerate(ids.tolist()):
            words = philox_words((0, graph, step, 2), -3) + philox_words((1, graph, step, 2), -3)
            assert drawn[s, g].tolist() == [((word >> 9) + 0.5) / 2**23 for word in words[:6]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: random_trees([3, 0], seed=0), "sizes: expected at least 1 node"),
        (lambda: random_trees([3], extra_edges=-0.1, seed=0), "extra_edges: expected"),
        (lambda: random_trees([3], extra_edges=torch.ones(2), seed=0), "extra_edges: expected"),
        (lambda: random_trees([3], extra_edges=torch.ones(1, 1), seed=0), "extra_edges: expected"),
        (lambda: random_trees([3], extra_edges=float("inf"), seed=0), "extra_edges: expected a finite number"),
        (lambda: random_trees([3], extra_edges="x", seed=0), "extra_edges: expected a finite number"),
        (lambda: sample_sizes((1, 4), 1, seed=0, spread=float("inf")), "spread: expected"),
        (lambda: GraphPrior(mean_degree=()), "mean_degree: expected None, a number above 0 or several"),
        (lambda: GraphPrior(mean_degree=(2.0, 0.0)), "mean_degree: expected None, a number above 0 or several"),
        (lambda: random_trees([3], hub_share=1.5, seed=0), "hub_share: expected a finite number of shares, in"),
        (lambda: random_graphs([3], torch.ones(2), seed=0), "mean_degree: expected"),
        (lambda: sample_sizes((1, 4), 1, seed=0, spread=-0.1), "spread: expected"),
        (lambda: GraphPrior.around(1), "mean_nodes: expected 2 or more"),
        (lambda: GraphPrior(hub_share=1.1), "hub_share: expected None or a number in"),
        (lambda: GraphPrior(size_spread=-1.0), "size_spread: expected None or a number in"),
        (lambda: GraphPrior(degree_growth="x"), "degree_growth: expected None or a number in"),
        (lambda: random_trees([3], attachment=1.5, seed=0), "attachment: expected an exponent in"),
        (lambda: random_trees([3, 3], seed=0, graph_ids=[1, 1]), "graph_ids: expected distinct ids"),
        (lambda: random_graphs([3], -1.0, seed=0), "mean_degree: expected"),
        (lambda: random_features("two-hot", 3, 2, seed=0), "kind: expected one of"),
        (lambda: random_features("one-hot", 0, 2, seed=0), "num_features: expected"),
        (lambda: random_features("degree", 3, 2, seed=0), "edges: expected edges of 2 nodes"),
        (lambda: random_features("degree", 3, 2, seed=0, edges=random_trees([3], seed=0)), "got 3 nodes"),
        (lambda: random_features("constant", 3, -2, seed=0), "num_nodes: expected"),
        (lambda: sample_sizes((5, 4), 1, seed=0), "prior: expected"),
        (lambda: sample_sizes((0, 4), 1, seed=0), "prior: expected"),
        (lambda: sample_sizes((1, 4), -1, seed=0), "count: expected"),
        (lambda: balanced_labels(3, 0, seed=0), "num_classes: expected"),
        (lambda: random_features("one-hot", 3, 2, seed=2**64), "seed: expected"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(InputError, match=message):
        call()
