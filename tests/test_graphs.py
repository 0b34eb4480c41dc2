"""Edge lists, selections and the conversions of graphs to and from other libraries."""

from __future__ import annotations

import networkx
import numpy as np
import pytest
import torch
from helpers import dense, normal, random_edges
from hypothesis import given, settings
from hypothesis import strategies as st

import acgkd_fast as af
from acgkd_fast.errors import InputError

SIZES = st.lists(st.integers(0, 6), min_size=1, max_size=5)


def make_graphs(sizes, *, symmetric=True, seed=0, width=3, labels=True, density=0.4) -> af.GraphBatch:
    edges, _ = random_edges(sizes, symmetric=symmetric, seed=seed, density=density)
    edges = edges.with_value(edges.value.detach(), symmetric=symmetric)
    y = torch.arange(len(sizes)) % 3 if labels else None
    return af.GraphBatch(normal((sum(sizes), width), seed), edges, y)


def one_graph(graphs: af.GraphBatch, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Features and dense adjacency of one graph, cut out of the whole batch's."""
    first, last = graphs.ptr[number : number + 2].tolist()
    return graphs.x[first:last], dense(graphs.edges)[first:last, first:last]


def assert_same(graphs: af.GraphBatch, other: af.GraphBatch) -> None:
    assert graphs.ptr.tolist() == other.ptr.tolist()
    assert torch.equal(graphs.x, other.x)
    assert torch.equal(dense(graphs.edges), dense(other.edges))
    assert (graphs.y is None) == (other.y is None)
    assert graphs.y is None or torch.equal(graphs.y, other.y)


@settings(max_examples=40, deadline=None)
@given(SIZES, st.booleans(), st.integers(0, 99))
def test_edge_list_round_trip(sizes, symmetric, seed):
    graphs = make_graphs(sizes, symmetric=symmetric, seed=seed)
    edge_index, weight = graphs.to_edge_index()
    again = af.EdgeSample.from_edge_index(edge_index.flip(1), graphs.ptr, weight.flip(0), symmetric=symmetric)
    for name in ("rowptr", "col", "value", "ptr"):
        assert torch.equal(getattr(again, name), getattr(graphs.edges, name)), name
    matrix = torch.zeros(sum(sizes), sum(sizes), dtype=weight.dtype)
    for (source, target), value in zip(edge_index.t().tolist(), weight, strict=True):
        matrix[target, source] += value
    assert torch.equal(matrix, dense(graphs.edges))


def test_rows_receive_and_repeated_edges_stay():
    edge_index = torch.tensor([[2, 0, 0, 0], [1, 1, 2, 1]])
    edges = af.EdgeSample.from_edge_index(edge_index, torch.tensor([0, 3]), torch.tensor([5.0, 1.0, 2.0, 3.0]))
    assert edges.rowptr.tolist() == [0, 0, 3, 4]
    assert edges.col.tolist() == [0, 0, 2, 0]
    assert edges.value.tolist() == [1.0, 3.0, 5.0, 2.0]
    assert edges.row().tolist() == [1, 1, 1, 2]
    assert not edges.symmetric


@pytest.mark.parametrize(
    ("pairs", "symmetric"),
    [([], True), ([(0, 1), (1, 0)], True), ([(0, 1)], False), ([(0, 1), (1, 0), (0, 1)], False), ([(2, 2)], True)],
)
def test_symmetry_is_found(pairs, symmetric):
    edge_index = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).t()
    edges = af.EdgeSample.from_edge_index(edge_index, torch.tensor([0, 3]))
    assert edges.symmetric is symmetric
    assert edges.has_self_loops() is ((2, 2) in pairs)


@pytest.mark.parametrize(
    ("edge_index", "ptr", "weight", "message"),
    [
        (torch.tensor([[0], [3]]), [0, 3], None, "edge_index: expected node numbers in 0..2"),
        (torch.tensor([[-1], [0]]), [0, 3], None, "edge_index: expected node numbers in 0..2"),
        (torch.tensor([[0], [2]]), [0, 2, 3], None, "edge_index: expected both ends of an edge in one graph"),
        (torch.tensor([[0, 1]]), [0, 3], None, "edge_index: expected a tensor of shape"),
        (torch.tensor([[0.0], [1.0]]), [0, 3], None, "edge_index: expected dtype int64"),
        (torch.tensor([[0], [1]]), [], None, "ptr: expected the B \\+ 1 node offsets"),
        (torch.tensor([[0], [1]]), [0, 3], torch.ones(2), "edge_weight: expected a tensor of shape \\(1\\)"),
    ],
)
def test_bad_edge_lists_are_named(edge_index, ptr, weight, message):
    with pytest.raises(InputError, match=message) as caught:
        af.EdgeSample.from_edge_index(edge_index, torch.tensor(ptr, dtype=torch.int64), weight)
    assert "\n" not in str(caught.value)


def test_edge_weights_keep_their_gradient():
    weight = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    edges = af.EdgeSample.from_edge_index(torch.tensor([[2, 0, 1], [0, 2, 0]]), torch.tensor([0, 3]), weight)
    (edges.value * torch.tensor([10.0, 100.0, 1000.0])).sum().backward()
    # Sorted by target, then source: edges 2, 0, 1.
    assert weight.grad.tolist() == [100.0, 1000.0, 10.0]


@settings(max_examples=40, deadline=None)
@given(SIZES, st.booleans(), st.integers(0, 99))
def test_transpose(sizes, symmetric, seed):
    edges = make_graphs(sizes, symmetric=symmetric, seed=seed).edges
    rowptr, col, position = edges.transposed()
    if symmetric:
        assert rowptr is col is position is None
        assert torch.equal(dense(edges), dense(edges).t())
    else:
        flipped = af.EdgeSample(rowptr, col, edges.value[position.long()], edges.ptr, False)
        assert torch.equal(dense(flipped), dense(edges).t())


@settings(max_examples=60, deadline=None)
@given(SIZES, st.booleans(), st.integers(0, 99), st.data())
def test_select_takes_whole_graphs_in_order(sizes, symmetric, seed, data):
    graphs = make_graphs(sizes, symmetric=symmetric, seed=seed)
    chosen = data.draw(st.lists(st.integers(0, len(sizes) - 1), max_size=6))
    picked = graphs.select(chosen)
    assert picked.num_graphs == len(chosen) and picked.edges.symmetric == symmetric
    assert picked.y.tolist() == [graphs.y[g].item() for g in chosen]
    for position, number in enumerate(chosen):
        for have, want in zip(one_graph(picked, position), one_graph(graphs, number), strict=True):
            assert torch.equal(have, want)
    assert picked.edges.num_edges == sum(int((one_graph(graphs, g)[1] != 0).sum()) for g in chosen)


def test_select_passes_gradients_and_skips_unused_capacity():
    layout = af.PairLayout.complete([4, 3, 5])
    logits = torch.linspace(-2, 2, layout.num_pairs).requires_grad_()
    edges = af.sample_edges(logits, layout, seed=1, estimator="relaxed", capacity=100)
    picked = af.GraphBatch(torch.zeros(12, 1), edges).select([2, 0])
    assert picked.edges.num_edges == 20 + 12 == picked.edges.col.numel()
    picked.edges.value.sum().backward()
    assert (logits.grad[:6] != 0).all() and (logits.grad[6:9] == 0).all() and (logits.grad[9:] != 0).all()


@pytest.mark.parametrize("positions", [[3], [-1], [0.0, 1.0], torch.tensor([True, False, True]), [[0, 9]]])
def test_select_rejects_what_is_no_position(positions):
    with pytest.raises(InputError, match="graphs: expected"):
        make_graphs([2, 3, 1]).select(positions)


def test_open_gradients_of_absent_candidates_are_not_lost_silently():
    layout = af.PairLayout.complete([4, 3])
    edges = af.sample_edges(torch.zeros(layout.num_pairs, requires_grad=True), layout, seed=0)
    graphs = af.GraphBatch(torch.zeros(7, 1), edges)
    for lose in (lambda: graphs.select([0]), lambda: af.GraphBatch.concatenate([graphs, graphs])):
        with pytest.raises(InputError, match="open gradients"):
            lose()
    closed = edges.with_value(edges.value.detach(), symmetric=True)
    assert af.GraphBatch(graphs.x, closed).select([0]).num_nodes == 4


@settings(max_examples=40, deadline=None)
@given(SIZES, st.integers(0, 99), st.booleans(), st.booleans(), st.data())
def test_concatenate_undoes_select(sizes, seed, symmetric, labels, data):
    graphs = make_graphs(sizes, seed=seed, symmetric=symmetric, labels=labels)
    cut = data.draw(st.integers(0, len(sizes)))
    parts = [graphs.select(range(cut)), graphs.select(range(cut, len(sizes)))]
    joined = af.GraphBatch.concatenate(parts)
    assert_same(joined, graphs)
    assert joined.edges.symmetric == symmetric


def test_concatenate_rejects_batches_that_do_not_fit():
    graphs = make_graphs([2, 3])
    with pytest.raises(InputError, match="at least one"):
        af.GraphBatch.concatenate([])
    with pytest.raises(InputError, match="labels on all or on none"):
        af.GraphBatch.concatenate([graphs, make_graphs([2], labels=False)])
    with pytest.raises(InputError, match=r"one width, got \[3, 4\]"):
        af.GraphBatch.concatenate([graphs, make_graphs([2], width=4)])


def test_drop_zeros_leaves_the_other_entries():
    edges = make_graphs([3, 4], symmetric=False, density=0.9).edges
    value = edges.value.clone()
    value[::2] = 0.0
    thin = edges.with_value(value).drop_zeros()
    assert thin.num_edges == int((value != 0).sum())
    assert torch.equal(dense(thin), dense(edges.with_value(value)))


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (torch.zeros(4, 2), None, r"x: expected a tensor of shape \(5, any\)"),
        (torch.zeros(5), None, r"x: expected a tensor of shape \(5, any\)"),
        (torch.zeros(5, 2), torch.zeros(3, dtype=torch.int64), r"y: expected a tensor of shape \(2\)"),
        (torch.zeros(5, 2), torch.zeros(2), "y: expected dtype int64"),
    ],
)
def test_batch_rejects_tensors_that_do_not_fit(x, y, message):
    with pytest.raises(InputError, match=message):
        af.GraphBatch(x, make_graphs([2, 3]).edges, y)


@settings(max_examples=40, deadline=None)
@given(SIZES, st.booleans(), st.integers(0, 99))
def test_dense_round_trip(sizes, symmetric, seed):
    graphs = make_graphs(sizes, symmetric=symmetric, seed=seed)
    x, adjacency, mask = graphs.to_dense()
    assert mask.sum(1).tolist() == sizes and mask.shape[1] == max(sizes)
    for number, n in enumerate(sizes):
        features, matrix = one_graph(graphs, number)
        assert torch.equal(x[number, :n], features) and torch.equal(adjacency[number, :n, :n], matrix)
    assert (x[~mask] == 0).all() and (adjacency[~mask] == 0).all() and (adjacency.mT[~mask] == 0).all()
    assert_same(af.GraphBatch.from_dense(x, adjacency, mask, graphs.y), graphs)


def test_dense_conversions_pass_gradients():
    weight = torch.rand(2, 4, 4, dtype=torch.float64)
    leaf = ((weight + weight.mT) * (1 - torch.eye(4))).requires_grad_()
    x = normal((2, 4, 3), 0).requires_grad_()
    graphs = af.GraphBatch.from_dense(x, leaf)
    # Entries that look tied are not: each one's own gradient must come out.
    assert not graphs.edges.symmetric
    upstream = normal((8, 3), 1)
    actual = torch.autograd.grad(af.gcn_propagate(graphs.x, graphs.edges), (x, leaf), upstream)
    degree = leaf.sum(-1) + 1
    scale = torch.diag_embed(degree**-0.5)
    out = scale @ (leaf + torch.eye(4)) @ scale @ x
    expected = torch.autograd.grad(out, (x, leaf), upstream.reshape(2, 4, 3))
    off_diagonal = 1 - torch.eye(4)
    torch.testing.assert_close(actual[0], expected[0])
    torch.testing.assert_close(actual[1], expected[1] * off_diagonal)

    adjacency = af.GraphBatch.from_dense(x, leaf).edges.to_dense()[0]
    (back,) = torch.autograd.grad(adjacency.square().sum(), leaf)
    torch.testing.assert_close(back, 2 * leaf.detach())


def test_from_dense_rejects_edges_in_the_padding_and_padding_before_nodes():
    x, adjacency = torch.zeros(1, 3, 2), torch.ones(1, 3, 3)
    with pytest.raises(InputError, match="adjacency: expected no edges in the padding"):
        af.GraphBatch.from_dense(x, adjacency, torch.tensor([[True, True, False]]))
    with pytest.raises(InputError, match="mask: expected nodes before padding"):
        af.GraphBatch.from_dense(x, adjacency, torch.tensor([[True, False, True]]))


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.booleans(), st.integers(0, 99), st.booleans())
def test_pyg_round_trip(sizes, symmetric, seed, labels):
    pytest.importorskip("torch_geometric")
    graphs = make_graphs(sizes, symmetric=symmetric, seed=seed, labels=labels)
    batch = graphs.to_pyg()
    assert batch.batch.tolist() == graphs.batch().tolist() and batch.ptr.tolist() == graphs.ptr.tolist()
    for number, data in enumerate(batch.to_data_list()):
        features, matrix = one_graph(graphs, number)
        assert torch.equal(data.x, features) and data.num_nodes == sizes[number]
        rebuilt = torch.zeros_like(matrix)
        rebuilt[data.edge_index[1], data.edge_index[0]] = data.edge_weight
        assert torch.equal(rebuilt, matrix)
        assert not labels or data.y.tolist() == [graphs.y[number].item()]
    assert_same(af.GraphBatch.from_pyg(batch), graphs)
    assert_same(af.GraphBatch.from_pyg(batch.to_data_list()), graphs)


def test_from_pyg_takes_plain_graphs_as_users_have_them():
    data = pytest.importorskip("torch_geometric.data")
    triangle = torch.tensor([[0, 1, 2, 1, 2, 0], [1, 2, 0, 0, 1, 2]])
    graphs = [
        data.Data(x=torch.tensor([[1], [0], [2]]), edge_index=triangle, y=1),
        data.Data(x=torch.tensor([[4], [5]]), edge_index=torch.empty(2, 0, dtype=torch.int64), y=0, num_nodes=2),
    ]
    batch = af.GraphBatch.from_pyg(graphs)
    assert batch.x.dtype == torch.float32 and batch.x.flatten().tolist() == [1, 0, 2, 4, 5]
    assert batch.y.tolist() == [1, 0] and batch.sizes.tolist() == [3, 2]
    assert batch.edges.symmetric and batch.edges.value.tolist() == [1.0] * 6


def test_from_pyg_rejects_what_it_would_spoil():
    data = pytest.importorskip("torch_geometric.data")
    edge_index = torch.tensor([[0, 1], [1, 0]])
    x = torch.zeros(2, 3)
    cases = {
        "at least one": [],
        "node features": [data.Data(edge_index=edge_index, num_nodes=2)],
        "integer class labels": [data.Data(x=x, edge_index=edge_index, y=torch.tensor([0.5]))],
        "y: expected a tensor of shape": [data.Data(x=x, edge_index=edge_index, y=torch.tensor([[0, 1]]))],
    }
    for message, graphs in cases.items():
        with pytest.raises(InputError, match=message):
            af.GraphBatch.from_pyg(graphs)


def test_without_torch_geometric_one_line_says_so(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch_geometric", None)
    monkeypatch.setitem(__import__("sys").modules, "torch_geometric.data", None)
    graphs = make_graphs([2, 3])
    with pytest.raises(InputError, match="to_pyg: expected torch-geometric"):
        graphs.to_pyg()
    with pytest.raises(InputError, match="from_pyg: expected torch-geometric"):
        af.GraphBatch.from_pyg([])


def test_sparse_tensor():
    pytest.importorskip("torch_sparse")
    graphs = make_graphs([3, 4], symmetric=False)
    assert torch.equal(graphs.to_sparse_tensor().to_dense(), dense(graphs.edges))


def test_without_torch_sparse_one_line_says_so(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch_sparse", None)
    with pytest.raises(InputError, match="torch-sparse"):
        make_graphs([3]).to_sparse_tensor()


def test_to_moves_every_tensor_and_keeps_gradients():
    layout = af.PairLayout.complete([3, 4])
    logits = torch.zeros(layout.num_pairs, requires_grad=True)
    edges = af.sample_edges(logits, layout, seed=0, estimator="relaxed")
    graphs = af.GraphBatch(torch.zeros(7, 1), edges, torch.tensor([0, 1]))
    moved = graphs.to("meta")
    for tensor in (
        moved.x,
        moved.y,
        moved.edges.rowptr,
        moved.edges.col,
        moved.edges.value,
        moved.ptr,
        moved.edges.pair,
    ):
        assert tensor.device.type == "meta"
    assert moved.edges.layout.device.type == "meta" and moved.edges.value.requires_grad
    assert moved.edges.symmetric and moved.num_nodes == 7 and moved.num_graphs == 2


def test_has_self_loops_follows_the_graphs():
    edge_index = torch.tensor([[0, 2, 3], [1, 2, 4]])
    edges = af.EdgeSample.from_edge_index(edge_index, torch.tensor([0, 2, 3, 5]))
    graphs = af.GraphBatch(torch.zeros(5, 1), edges)
    assert edges.has_self_loops()
    assert graphs.select([1]).edges.has_self_loops()
    assert not graphs.select([0, 2]).edges.has_self_loops()
    loopless = graphs.select([0, 2])
    assert not loopless.edges.has_self_loops() and not loopless.select([1]).edges.has_self_loops()
    both = af.GraphBatch.concatenate([loopless, graphs])
    assert both.edges.has_self_loops()


def test_agrees_with_networkx():
    graph = networkx.karate_club_graph()
    pairs = torch.tensor(list(graph.edges)).t()
    edges = af.EdgeSample.from_edge_index(torch.cat([pairs, pairs.flip(0)], dim=1), torch.tensor([0, 34]))
    assert edges.symmetric
    assert np.array_equal(dense(edges).numpy(), networkx.to_numpy_array(graph, weight=None))


def test_detached_graphs_lead_nowhere():
    layout = af.PairLayout.complete([4, 3])
    logits = torch.zeros(layout.num_pairs, requires_grad=True)
    x = torch.ones(7, 2, requires_grad=True)
    graphs = af.GraphBatch(x, af.sample_edges(logits, layout, seed=0), torch.tensor([0, 1]))
    alone = graphs.detach()
    assert graphs.edges.value.requires_grad and graphs.edges.port is not None
    assert not alone.x.requires_grad and not alone.edges.value.requires_grad and alone.edges.port is None
    assert torch.equal(alone.edges.to_dense()[0], graphs.edges.to_dense()[0]) and torch.equal(alone.y, graphs.y)
    # Selecting is refused while gradients of absent candidates are open, and allowed afterwards.
    assert alone.select([1]).num_nodes == 3
    moved = graphs.to("cpu", non_blocking=True)
    (grad,) = torch.autograd.grad(moved.edges.value.sum(), logits)
    assert grad.any()
