"""Pair layouts: index maps against plain loops, limits, and draws that do not depend on the batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import LAYOUT_KINDS, enumerate_pairs, layouts, make_layout
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import acgkd_fast as af
from acgkd_fast import PairLayout

SIZES = [1, 5, 2, 8, 1]
# The largest n with n (n - 1) / 2 <= 2^34.
LARGEST_COMPLETE = 185364


@settings(max_examples=80, deadline=None)
@given(layouts())
def test_index_maps_are_inverse_bijections(layout):
    expected = enumerate_pairs(layout)
    assert layout.num_pairs == len(expected)
    row, col = layout.pair_nodes()
    assert list(zip(row.tolist(), col.tolist(), strict=True)) == [(r, c) for _, r, c in expected]
    assert torch.equal(layout.pair_index(row, col), torch.arange(layout.num_pairs))
    assert layout.graph_of_pair(torch.arange(layout.num_pairs)).tolist() == [g for g, _, _ in expected]
    assert layout.pairs_per_graph == tuple(
        sum(g == graph for g, _, _ in expected) for graph in range(layout.num_graphs)
    )
    assert layout.pair_ptr.tolist() == [sum(layout.pairs_per_graph[:g]) for g in range(layout.num_graphs + 1)]


@settings(max_examples=60, deadline=None)
@given(layouts(min_graphs=1))
def test_pair_index_of_every_node_pair(layout):
    """Also self loops, pairs across graphs in either order, and pairs outside the band: all -1."""
    number = {(row, col): pair for pair, (_, row, col) in enumerate(enumerate_pairs(layout))}
    if not layout.directed:
        number |= {(col, row): pair for (row, col), pair in number.items()}
    nodes = torch.arange(layout.num_nodes)
    found = layout.pair_index(*torch.meshgrid(nodes, nodes, indexing="ij"))
    expected = [[number.get((row, col), -1) for col in nodes.tolist()] for row in nodes.tolist()]
    assert found.tolist() == expected


@pytest.mark.parametrize("kind", LAYOUT_KINDS)
def test_undirected_pairs_come_low_first_and_directed_ones_alternate(kind):
    row, col = make_layout(kind, SIZES).pair_nodes()
    if kind.endswith("-directed"):
        assert bool((row < col)[::2].all()) and bool((row > col)[1::2].all())
    else:
        assert bool((row < col).all())


@pytest.mark.parametrize("directed", [False, True])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 9, 10])
def test_budget_one_holds_every_pair(n, directed):
    budget = PairLayout.budget([n, 3], 1.0, directed=directed)
    complete = PairLayout.complete([n, 3], directed=directed)
    assert budget.num_pairs == complete.num_pairs
    held = zip(*(side.tolist() for side in budget.pair_nodes()), strict=True)
    assert set(held) == set(zip(*(side.tolist() for side in complete.pair_nodes()), strict=True))


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 60), st.floats(0.01, 1.0))
def test_budget_partners_per_node(n, xi):
    row, col = PairLayout.budget([n], xi).pair_nodes()
    partners = torch.bincount(torch.cat([row, col]), minlength=n)
    # Partners come in twos, at least one on either side, and never more than n - 1.
    wanted = min(max(xi * (n - 1), 2), n - 1)
    assert partners.min() == partners.max() and abs(int(partners[0]) - wanted) <= 1


def test_nodes_and_graphs():
    layout = PairLayout.complete(SIZES)
    assert (layout.num_graphs, layout.num_nodes) == (5, 17)
    assert layout.node_ptr.tolist() == [0, 1, 6, 8, 16, 17]
    assert layout.graph_of_node().tolist() == [0] + [1] * 5 + [2] * 2 + [3] * 8 + [4]
    assert [make_layout(kind, SIZES).kind for kind in LAYOUT_KINDS] == [0, 1, 2, 3]


def test_no_graphs_at_all():
    layout = PairLayout.complete([])
    assert (layout.num_graphs, layout.num_nodes, layout.num_pairs) == (0, 0, 0)
    assert layout.table.shape == (4, 1) and layout.uniforms(seed=1).shape == (0,)


@pytest.mark.parametrize("directed", [False, True])
@pytest.mark.parametrize("n", [100_000, LARGEST_COMPLETE])
def test_big_complete_graphs_near_float_rounding(n, directed):
    if directed:
        # Twice the pairs: the largest directed graph is smaller by the square root of two.
        n = min(n, 131_072)
    layout = PairLayout.complete([3, n], directed=directed)
    factor = 2 if directed else 1
    high = np.random.default_rng(0).integers(n // 2, n, 2000)
    # The first and last pair of a triangle row is where a rounded square root goes wrong.
    starts = torch.from_numpy(np.concatenate([high * (high - 1) // 2, [n * (n - 1) // 2 - 1]]))
    local = torch.cat([starts - 1, starts, starts + 1])
    local = local[local < n * (n - 1) // 2]
    pair = layout.pairs_per_graph[0] + torch.cat([factor * local, factor * local + factor - 1])
    row, col = layout.pair_nodes(pair)
    assert bool((row != col).all()) and int(torch.maximum(row, col).max()) == n + 2
    assert int(torch.minimum(row, col).min()) >= 3
    assert torch.equal(layout.pair_index(row, col), pair)


@pytest.mark.parametrize("directed", [False, True])
def test_big_budget_graph(directed):
    layout = PairLayout.budget([100_000], 0.01, directed=directed)
    last = layout.num_pairs
    pair = torch.cat([torch.arange(1000), torch.arange(last - 1000, last)])
    assert torch.equal(layout.pair_index(*layout.pair_nodes(pair)), pair)
    assert last == (2 if directed else 1) * 100_000 * 500


def test_pair_limit_per_graph():
    assert PairLayout.complete([LARGEST_COMPLETE]).num_pairs <= 2**34
    for bad in (
        lambda: PairLayout.complete([5, LARGEST_COMPLETE + 1]),
        lambda: PairLayout.complete([LARGEST_COMPLETE], directed=True),
        lambda: PairLayout.budget([10**6], 0.5),
    ):
        with pytest.raises(af.InputError, match=r"^sizes: expected at most 2\^34 candidate pairs per graph, got \d+$"):
            bad()


@pytest.mark.parametrize("sizes", [[2**31], [2**31 - 1, 1], [2**62, 2**62], [2**70]])
def test_node_limit(sizes):
    with pytest.raises(af.InputError, match=r"^sizes: expected at most 2147483647 nodes in all"):
        PairLayout.budget(sizes, 1e-9)


@settings(max_examples=40, deadline=None)
@given(layouts(min_graphs=1), st.data(), st.integers(0, 2**32 - 1))
def test_select_keeps_draws(layout, data, seed):
    graphs = data.draw(st.permutations(range(layout.num_graphs)))[: data.draw(st.integers(0, layout.num_graphs))]
    chosen = layout.select(graphs)
    assert chosen.sizes == tuple(layout.sizes[g] for g in graphs)
    assert (chosen.kind, chosen.xi) == (layout.kind, layout.xi)
    per_graph = layout.uniforms(seed=seed, step=3).split(layout.pairs_per_graph)
    expected = torch.cat([torch.zeros(0), *(per_graph[g] for g in graphs)])
    assert torch.equal(chosen.uniforms(seed=seed, step=3), expected)


def test_a_grown_graph_keeps_its_draws():
    small, grown = PairLayout.complete([6]), PairLayout.complete([9])
    assert torch.equal(grown.uniforms(seed=8)[: small.num_pairs], small.uniforms(seed=8))


@settings(max_examples=30, deadline=None)
@given(layouts(min_graphs=2), st.integers(0, 100))
def test_seeds_steps_streams_and_ids_separate_draws(layout, seed):
    assume(layout.num_pairs > 0)
    drawn = layout.uniforms(seed=seed, step=1)
    for other in (
        layout.uniforms(seed=seed + 1, step=1),
        layout.uniforms(seed=seed, step=2),
        layout.uniforms(seed=seed, step=1, stream=af.philox.Stream.ABSENT),
    ):
        assert not torch.equal(drawn, other)


@settings(max_examples=30, deadline=None)
@given(layouts())
def test_rebuilt_from_its_table(layout):
    rebuilt = PairLayout.from_table(layout.table, layout.kind)
    for name in ("sizes", "directed", "graph_ids", "is_complete", "kind", "pairs_per_graph", "num_pairs"):
        assert getattr(rebuilt, name) == getattr(layout, name)


@pytest.mark.parametrize("kind", LAYOUT_KINDS)
def test_counts_never_read_the_device(kind):
    """On the meta device any host read raises, as it would stall or break a CUDA graph capture."""
    layout = make_layout(kind, SIZES, device="meta")
    here = make_layout(kind, SIZES)
    assert (layout.num_pairs, layout.num_nodes, layout.kind) == (here.num_pairs, here.num_nodes, here.kind)
    moved = here.to("meta")
    assert moved.device.type == "meta" and moved.num_pairs == here.num_pairs and here.to("cpu") is here


@pytest.mark.parametrize("sizes", [np.array([3, 4]), torch.tensor([3, 4]), (3, 4), [np.int32(3), 4], range(3, 5)])
def test_sizes_come_as_any_integers(sizes):
    layout = PairLayout.complete(sizes, graph_ids=sizes)
    assert layout.sizes == layout.graph_ids == (3, 4)
    assert all(type(n) is int for n in layout.sizes)


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda: PairLayout.complete([3, 0]), "sizes: expected at least 1 node in every graph, got a graph of 0"),
        (lambda: PairLayout.complete([-2]), "sizes: expected at least 1 node in every graph, got a graph of -2"),
        (lambda: PairLayout.complete([2.5]), "sizes: expected integers, got 2.5"),
        (lambda: PairLayout.complete([True]), "sizes: expected integers, got True"),
        (lambda: PairLayout.complete("ab"), "sizes: expected integers, got 'a'"),
        (lambda: PairLayout.complete(5), "sizes: expected a sequence of integers, got 5"),
        (lambda: PairLayout.complete(torch.tensor(5)), "sizes: expected a sequence of integers, got int64 tensor"),
        (lambda: PairLayout.complete(torch.tensor([2.0])), "sizes: expected integers, got 2.0"),
        (lambda: PairLayout.budget([3], 0), r"xi: expected a number in \(0, 1\], got 0"),
        (lambda: PairLayout.budget([3], -0.5), r"xi: expected a number in \(0, 1\], got -0.5"),
        (lambda: PairLayout.budget([3], 1.5), r"xi: expected a number in \(0, 1\], got 1.5"),
        (lambda: PairLayout.budget([3], float("nan")), r"xi: expected a number in \(0, 1\], got nan"),
        (lambda: PairLayout.budget([3], True), r"xi: expected a number in \(0, 1\], got True"),
        (lambda: PairLayout.budget([3], "0.5"), r"xi: expected a number in \(0, 1\], got '0.5'"),
        (lambda: PairLayout.complete([2, 2], graph_ids=[7, 7]), r"graph_ids: expected distinct ids, got \(7, 7\)"),
        (lambda: PairLayout.complete([2, 2], graph_ids=[7]), r"graph_ids: expected 2 ids, one per graph, got \(7,\)"),
        (lambda: PairLayout.complete([2], graph_ids=[2**32]), r"graph_ids: expected ids in 0..2\^32-1"),
        (lambda: PairLayout.complete([2], graph_ids=[-1]), r"graph_ids: expected ids in 0..2\^32-1"),
        (lambda: PairLayout.complete([2]).select([1]), r"graphs: expected positions in 0..0, got \(1,\)"),
        (lambda: PairLayout.complete([2]).select([-1]), r"graphs: expected positions in 0..0, got \(-1,\)"),
        (lambda: PairLayout.complete([2, 3]).select([0, 0]), r"graph_ids: expected distinct ids, got \(0, 0\)"),
    ],
)
def test_bad_input_is_named(build, text):
    with pytest.raises(af.InputError, match=f"^{text}"):
        build()
