"""Edge weights in every layer: dense formulas, absence and presence, samples, gradients, the memory of sorted lists."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch
from helpers import dense, normal, random_edges
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import acgkd_fast as af
from acgkd_fast.errors import InputError
from acgkd_fast.nn import GATConv, GCNConv, GINConv, GINEConv, SAGEConv, adjacency

CLOSE = {"rtol": 1e-6, "atol": 1e-8}


def make_layers():
    """Every layer that takes weights without edge features, in float64, by name."""
    torch.manual_seed(0)
    layers = {
        "gcn": GCNConv(3, 4),
        "gcn-wide": GCNConv(3, 2),
        "gcn-improved": GCNConv(3, 4, improved=True),
        "gin": GINConv(nn.Linear(3, 4), eps=0.2),
        "sage-mean": SAGEConv(3, 4),
        "sage-mean-narrow": SAGEConv(3, 2),
        "sage-sum": SAGEConv(3, 4, aggr="sum"),
        "sage-max": SAGEConv(3, 4, aggr="max"),
        "sage-min": SAGEConv(3, 4, aggr="min"),
        "gat": GATConv(3, 4, heads=2),
        "gat-no-loops": GATConv(3, 4, heads=2, add_self_loops=False),
    }
    return {name: layer.double() for name, layer in layers.items()}


LAYERS = make_layers()


def run(layer, x, edge_index, weight=None):
    return layer(x, edge_index, **({} if weight is None else {"edge_weight": weight}))


def by_matrix(name, x, a):
    """The layer's formula on a dense matrix of weights [N, N] whose rows receive; without self-loops."""
    layer, n = LAYERS[name], len(x)
    eye = torch.eye(n, dtype=x.dtype)
    if name.startswith("gcn"):
        full = a + eye * (2 if "improved" in name else 1)
        scale = full.sum(1).rsqrt()
        return scale[:, None] * full @ (scale[:, None] * (x @ layer.lin.weight.t())) + layer.bias
    if name == "gin":
        return layer.nn((1 + layer.eps) * x + a @ x)
    if name.startswith("sage"):
        if name in ("sage-max", "sage-min"):
            sign = 1 if name == "sage-max" else -1
            messages = (sign * a[:, :, None] * x).masked_fill((a == 0)[:, :, None], -torch.inf)
            near = sign * messages.max(1).values.masked_fill((a == 0).all(1)[:, None], 0.0)
        else:
            total = a.sum(1, keepdim=True) if "mean" in name else torch.ones(n, 1, dtype=x.dtype)
            near = a @ x / torch.where(total == 0, 1.0, total)
        return layer.lin_l(near) + layer.lin_r(x)
    h = layer.lin(x).view(n, 2, 4)
    full = a + eye if name == "gat" else a
    heads = []
    for k in range(2):
        e = (h[:, k] * layer.att_dst[0, k]).sum(-1)[:, None] + (h[:, k] * layer.att_src[0, k]).sum(-1)
        share = full * torch.nn.functional.leaky_relu(e, 0.2).exp()
        total = share.sum(1, keepdim=True)
        heads.append(share / torch.where(total == 0, 1.0, total) @ h[:, k])
    return torch.cat(heads, 1) + layer.bias


@pytest.mark.parametrize("name", LAYERS)
@settings(max_examples=25, deadline=None)
@given(num_nodes=st.integers(1, 8), seed=st.integers(0, 999))
def test_dense_formulas(name, num_nodes, seed):
    """Results and gradients of features and weights; some weights are 0, some nodes alone."""
    layer = LAYERS[name]
    rng = np.random.default_rng(seed)
    there = torch.from_numpy(rng.random((num_nodes, num_nodes)) < 0.5).fill_diagonal_(False)
    row, col = there.nonzero(as_tuple=True)
    draw = torch.from_numpy(rng.uniform(0.2, 1.5, len(row)) * (rng.random(len(row)) < 0.8))
    shuffled = torch.from_numpy(rng.permutation(len(row)))
    results = []
    for dense_form in (False, True):
        x, weight = normal((num_nodes, 3), seed).requires_grad_(), draw.clone().requires_grad_()
        if dense_form:
            a = torch.zeros(num_nodes, num_nodes, dtype=x.dtype).index_put((row, col), weight)
            out = by_matrix(name, x, a)
        else:
            edge_index = torch.stack([col, row])[:, shuffled]
            out = run(layer, x, edge_index, weight[shuffled])
        upstream = normal(out.shape, seed + 1)
        grads = torch.autograd.grad(out, [x, weight], upstream, allow_unused=True, materialize_grads=True)
        # Where nothing is (no own loop, no weight above 0) the layers define a slope that no formula has.
        occupied = torch.zeros(num_nodes, dtype=torch.bool).index_fill(0, row[draw > 0], True)
        defined = occupied[row] | torch.tensor(name != "gat-no-loops" and "sage" not in name)
        if name in ("sage-max", "sage-min"):
            defined = defined & (draw > 0)
        results.append([out, grads[0], grads[1][defined]])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, **CLOSE)


@pytest.mark.parametrize("name", LAYERS)
def test_weight_one_is_none_and_weight_zero_is_absence(name):
    layer, x = LAYERS[name], normal((6, 3), 0)
    edge_index = torch.tensor([[0, 1, 2, 3, 4, 0, 2], [1, 0, 1, 1, 3, 3, 3]])
    ones = torch.ones(7, dtype=x.dtype)
    if "improved" not in name:  # which, as in PyTorch Geometric, does nothing without weights
        torch.testing.assert_close(run(layer, x, edge_index, ones), run(layer, x, edge_index), **CLOSE)
    absent = torch.tensor([[5, 0, 5, 2], [1, 5, 2, 5]])
    with_absent = torch.cat([edge_index, absent], 1)
    weight = torch.cat([ones, torch.zeros(4, dtype=x.dtype)])
    # Beyond the range of exp: an absent neighbour must not push the others out of the softmax.
    far = torch.cat([x[:5], 1e4 * x[5:].sign()])
    expected = run(layer, far, edge_index, ones)
    torch.testing.assert_close(run(layer, far, with_absent, weight), expected, **CLOSE)


@pytest.mark.parametrize("name", ["sage-mean", "gat-no-loops"])
def test_slope_of_an_absent_edge_where_nothing_is(name):
    """It is the step to having that one edge, with all the mean or attention; and finite."""
    layer, x = LAYERS[name], normal((2, 3), 0)
    edge_index, weight = torch.tensor([[1], [0]]), torch.zeros(1, dtype=torch.float64, requires_grad=True)
    out = run(layer, x, edge_index, weight)
    upstream = normal(out.shape, 1)
    (slope,) = torch.autograd.grad(out, weight, upstream)
    step = run(layer, x, edge_index, torch.ones(1, dtype=x.dtype)) - out
    torch.testing.assert_close(slope, (step * upstream).sum().reshape(1), **CLOSE)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_a_sample_gives_what_its_edge_list_gives(name, symmetric):
    layer = LAYERS[name]
    edges, leaf = random_edges([4, 1, 6], symmetric=symmetric, seed=3)
    x = normal((11, 3), 0).requires_grad_()
    edge_index, weight = edges.to_edge_index()
    outs = [layer(x, edges), run(layer, x, edge_index, weight)]
    upstream = normal(outs[0].shape, 1)
    first, second = (torch.autograd.grad(out, [x, leaf], upstream, retain_graph=True) for out in outs)
    for actual, expected in zip((outs[0], *first), (outs[1], *second), strict=True):
        torch.testing.assert_close(actual, expected, **CLOSE)
    assert (first[1] != 0).any()
    assert torch.equal(layer(x, edges), outs[0])


@pytest.mark.parametrize("name", ["gcn", "gcn-improved", "gin", "sage-mean", "sage-mean-narrow", "sage-sum"])
def test_absent_candidates_get_their_gradient(name):
    """All-candidate straight-through against a dense matrix whose every entry has the relaxed slope."""
    layout = af.PairLayout.complete([5, 4])
    logits, x = normal(layout.num_pairs, 1).requires_grad_(), normal((9, 3), 2)
    edges = af.sample_edges(logits, layout, seed=3, temperature=0.7)
    out = LAYERS[name](x, edges)
    upstream = normal(out.shape, 4)
    (actual,) = torch.autograd.grad(out, logits, upstream)
    slopes = dense(af.sample_edges(logits, layout, seed=3, temperature=0.7, estimator="relaxed"))
    matrix = dense(edges).detach() + slopes - slopes.detach()
    (expected,) = torch.autograd.grad(by_matrix(name, x, matrix), logits, upstream)
    assert (expected != 0).all()
    torch.testing.assert_close(actual, expected, **CLOSE)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("estimator", ["relaxed", "sparse_straight_through", "hard_concrete"])
def test_unused_capacity_changes_nothing(name, estimator):
    layout = af.PairLayout.complete([5, 4])
    logits, x = normal(layout.num_pairs, 1).requires_grad_(), normal((9, 3), 2)
    results = []
    for capacity in (None, 100):
        edges = af.sample_edges(logits, layout, seed=3, temperature=0.7, estimator=estimator, capacity=capacity)
        out = LAYERS[name](x, edges)
        results.append((out, *torch.autograd.grad(out, logits, normal(out.shape, 4))))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, **CLOSE)
    assert (results[0][1] != 0).any()


@pytest.mark.parametrize("name", ["gat", "sage-mean", "sage-max"])
def test_gradcheck(name):
    layer, edge_index = LAYERS[name], torch.tensor([[0, 1, 2, 3, 4, 0, 2], [1, 0, 1, 1, 3, 3, 3]])
    x, weight = normal((5, 3), 0).requires_grad_(), torch.rand(7, dtype=torch.float64).add(0.2).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: run(layer, x, edge_index, w), (x, weight))


@pytest.mark.parametrize("as_sample", [True, False])
def test_gine_weighs_its_rectified_messages(as_sample):
    torch.manual_seed(0)
    layer = GINEConv(nn.Linear(3, 2), edge_dim=2).double()
    edges, _ = random_edges([4, 5], symmetric=False, seed=1)
    x, attr = normal((9, 3), 0), normal((edges.num_edges, 2), 1)
    edge_index, weight = edges.to_edge_index()
    total = x.clone()
    for (j, i), w, f in zip(edge_index.t().tolist(), weight, attr, strict=True):
        total[i] = total[i] + w * (x[j] + layer.lin(f)).relu()
    out = layer(x, edges, attr) if as_sample else layer(x, edge_index, attr, edge_weight=weight)
    torch.testing.assert_close(out, layer.nn(total), **CLOSE)
    (grad,) = torch.autograd.grad(out.sum(), edges.value if as_sample else weight)
    assert (grad != 0).any()


def test_gat_features_of_added_loops_are_weighted():
    layer = GATConv(3, 2, edge_dim=1, fill_value="mean").double()
    x, edge_index = normal((3, 3), 0), torch.tensor([[0, 2, 0], [1, 1, 2]])
    attr, weight = torch.tensor([1.0, 3.0, 5.0]).double(), torch.tensor([1.0, 0.0, 1.0]).double()
    kept = torch.tensor([0, 2])
    torch.testing.assert_close(
        layer(x, edge_index, attr, edge_weight=weight), layer(x, edge_index[:, kept], attr[kept]), **CLOSE
    )
    layer.fill_value = "mul"
    with pytest.raises(InputError, match="fill_value: expected add, mean, min or max with edge weights"):
        layer(x, edge_index, attr, edge_weight=weight)


def test_self_loops_of_a_sample_are_replaced_in_gat():
    edge_index = torch.tensor([[0, 0, 1], [0, 1, 0]])
    edges = af.EdgeSample.from_edge_index(edge_index, torch.tensor([0, 3]), torch.tensor([0.5, 2.0, 2.0]).double())
    layer, x = LAYERS["gat"], normal((3, 3), 0)
    expected = run(layer, x, edge_index[:, 1:], torch.tensor([2.0, 2.0]).double())
    torch.testing.assert_close(layer(x, edges), expected, **CLOSE)


# What is remembered of an edge list.


def test_an_edge_list_is_sorted_once_and_again_after_a_write():
    edge_index = torch.tensor([[2, 1, 0], [0, 2, 1]])
    first = adjacency.sorted_edges(edge_index, 3)
    assert adjacency.sorted_edges(edge_index, 3) is first
    assert adjacency.sorted_edges(edge_index, 4) is not first
    assert adjacency.sorted_edges(edge_index.clone(), 3) is not first
    edge_index[0, 0] = 1
    again = adjacency.sorted_edges(edge_index, 3)
    assert again is not first and again.col.tolist() == [1, 0, 1]


def test_what_is_remembered_goes_with_the_list():
    adjacency._cache.clear()
    edge_index = torch.tensor([[2, 1, 0], [0, 2, 1]])
    for layer in LAYERS.values():
        layer(normal((3, 3), 0), edge_index)
    adjacency.offsets(torch.tensor([0, 0, 1]), 2)
    assert id(edge_index) in adjacency._cache
    del edge_index
    gc.collect()
    assert not adjacency._cache


def test_memory_for_edge_lists_is_bounded(monkeypatch):
    monkeypatch.setattr(adjacency, "_CAPACITY", 50)
    adjacency._cache.clear()
    lists = [torch.zeros(2, 20, dtype=torch.int64) for _ in range(5)]
    for edge_index in lists:
        adjacency.sorted_edges(edge_index, 1)
    assert [id(kept) for kept in lists[-2:]] == list(adjacency._cache)


def test_inference_mode_remembers_nothing_and_works():
    with torch.inference_mode():
        edge_index, x = torch.tensor([[2, 1, 0], [0, 2, 1]]), normal((3, 3), 0)
        first = [layer(x, edge_index) for layer in LAYERS.values()]
        edge_index[0, 0] = 1
        second = [layer(x, edge_index) for layer in LAYERS.values()]
    assert not any(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    for layer, out in zip(LAYERS.values(), second, strict=True):
        torch.testing.assert_close(out, layer(x.clone(), torch.tensor([[1, 1, 0], [0, 2, 1]])), **CLOSE)


def test_what_inference_mode_sorted_serves_training():
    edge_index, x = torch.tensor([[2, 1, 0, 0], [0, 2, 1, 0]]), normal((3, 3), 0)
    weight = torch.rand(4, dtype=x.dtype)
    with torch.inference_mode():
        for layer in LAYERS.values():
            run(layer, x, edge_index), run(layer, x, edge_index, weight)
    for layer in LAYERS.values():
        leaf = weight.clone().requires_grad_()
        (run(layer, x, edge_index).sum() + run(layer, x, edge_index, leaf).sum()).backward()
        assert leaf.grad is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LAYERS)
def test_narrow_types(name, dtype):
    """Against float64 on the same rounded numbers."""
    import copy

    edge_index = torch.tensor([[0, 1, 2, 3, 4, 0, 2], [1, 0, 1, 1, 3, 3, 3]])
    narrow = copy.deepcopy(LAYERS[name]).to(dtype)
    wide = copy.deepcopy(narrow).double()
    x, weight = normal((5, 3), 0, dtype), torch.tensor([0.5, 1.0, 0.25, 2.0, 0.0, 1.5, 1.0]).to(dtype)
    out = run(narrow, x, edge_index, weight)
    assert out.dtype == dtype
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 4e-2}[dtype]
    expected = run(wide, x.double(), edge_index, weight.double())
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
