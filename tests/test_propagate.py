"""Message passing and readout against dense matrices, plain loops and PyTorch Geometric."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from helpers import dense, dense_gcn, dense_gin, entries, kernels, normal, random_edges  # noqa: F401
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

import acgkd_fast as af

pytestmark = pytest.mark.usefixtures("kernels")

DTYPES = (torch.float64, torch.float32, torch.bfloat16)
# Of the norm: bfloat16 keeps 8 bits of what it stores.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}
LAYERS = ("gcn", "gcn without self loops", "gin")


def fused(layer, x, edges, eps=0.0):
    return af.gin_propagate(x, edges, eps) if layer == "gin" else af.gcn_propagate(x, edges, layer == "gcn")


def by_matrix(layer, x, edges, eps=0.0):
    return dense_gin(dense(edges), x, eps) if layer == "gin" else dense_gcn(dense(edges), x, layer == "gcn")


def assert_near(actual, expected, dtype):
    assert actual.dtype == dtype and actual.shape == expected.shape and actual.isfinite().all()
    error, size = (actual.double() - expected).norm().item(), expected.norm().item()
    assert error <= TOLERANCE[dtype] * max(size, 1.0), (error, size)


def compare_with_matrix(layer, sizes, width, *, symmetric, seed, density, dtype):
    """Output and all gradients of the fused layer in `dtype` against the dense one in float64."""

    def run(forward, leaf_dtype):
        edges, weight = random_edges(
            sizes, symmetric=symmetric, seed=seed, density=density, dtype=leaf_dtype, rounded_to=dtype
        )
        x = normal((sum(sizes), width), seed, dtype).to(leaf_dtype).requires_grad_()
        eps = torch.tensor([0.25], dtype=leaf_dtype, requires_grad=True)
        leaves = [x, weight, eps] if layer == "gin" else [x, weight]
        out = forward(layer, x, edges, eps)
        upstream = normal(x.shape, seed + 1, dtype).to(leaf_dtype)
        return [out, *torch.autograd.grad(out, leaves, upstream)]

    for actual, expected in zip(run(fused, dtype), run(by_matrix, torch.float64), strict=True):
        assert_near(actual, expected, dtype)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(1, 9), max_size=4),
    st.integers(0, 5),
    st.sampled_from(LAYERS),
    st.booleans(),
    st.sampled_from(DTYPES),
    st.sampled_from([0.0, 0.2, 0.6, 1.0]),
    st.integers(0, 1000),
)
def test_ragged_batches_against_dense_matrices(sizes, width, layer, symmetric, dtype, density, seed):
    compare_with_matrix(layer, sizes, width, symmetric=symmetric, seed=seed, density=density, dtype=dtype)


@pytest.mark.parametrize("width", [1, 7, 8, 9, 16, 31, 64, 70])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("symmetric", [True, False], ids=["tied", "directed"])
@pytest.mark.parametrize("layer", LAYERS)
def test_widths_against_dense_matrices(layer, symmetric, dtype, width):
    """Widths on both sides of every vector length that a kernel may use."""
    compare_with_matrix(layer, [12, 1, 20], width, symmetric=symmetric, seed=width, density=0.3, dtype=dtype)


@pytest.mark.parametrize("symmetric", [True, False], ids=["tied", "directed"])
@pytest.mark.parametrize("layer", LAYERS)
def test_gradcheck(layer, symmetric):
    template, weight = random_edges([1, 4, 3], symmetric=symmetric, seed=3)
    # Which weight each entry takes its value from.
    source = (template.value[:, None] == weight).nonzero()[:, 1]
    x = normal((8, 2), 1).requires_grad_()
    eps = torch.tensor([0.1], dtype=torch.float64, requires_grad=True)

    def layer_of(features, weights, epsilon):
        return fused(layer, features, template.with_value(weights[source], symmetric=symmetric), epsilon)

    assert gradcheck(layer_of, (x, weight, eps) if layer == "gin" else (x, weight, eps.detach()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layer", LAYERS)
def test_tied_edges_equal_the_same_edges_called_directed(layer, dtype):
    tied, _ = random_edges([9, 5], symmetric=True, seed=4, dtype=dtype)
    x = normal((14, 6), 2, dtype)
    assert_near(fused(layer, x, tied.with_value(tied.value)), fused(layer, x, tied).double(), dtype)


@pytest.mark.parametrize("directed", [True, False])
def test_isolated_nodes_without_self_loops_give_zeros(directed):
    ptr = torch.tensor([0, 3, 4, 6])
    edge_index = torch.tensor([[0], [1]]) if directed else torch.tensor([[0, 1], [1, 0]])
    weight = torch.full((edge_index.shape[1],), 2.0, requires_grad=True)
    edges = af.EdgeSample.from_edge_index(edge_index, ptr, weight, symmetric=not directed)
    x = normal((6, 3), 0, torch.float32).requires_grad_()
    out = af.gcn_propagate(x, edges, add_self_loops=False)
    # A directed edge 0 -> 1 leaves node 0 without an in-degree, which takes it out of the layer.
    touched = torch.zeros(6, dtype=torch.bool) if directed else torch.arange(6) < 2
    assert torch.equal(out != 0, touched[:, None].expand(-1, 3))
    out.backward(normal(out.shape, 1, torch.float32))
    assert x.grad.isfinite().all() and weight.grad.isfinite().all()
    assert torch.equal((x.grad != 0).any(1), touched)


def test_edges_of_value_zero_leave_no_nan_behind():
    edges, _ = random_edges([5], symmetric=True, seed=1)
    value = torch.zeros_like(edges.value).requires_grad_()
    x = normal((5, 2), 0).requires_grad_()
    for loops in (True, False):
        out = af.gcn_propagate(x, edges.with_value(value, symmetric=True), loops)
        assert torch.equal(out, x if loops else torch.zeros_like(x))
        gradients = torch.autograd.grad(out.sum(), [x, value])
        assert all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("layer", LAYERS)
def test_repeated_edges_and_self_loops_add_up(layer):
    edge_index = torch.tensor([[0, 0, 2, 1, 1, 3], [1, 1, 0, 1, 0, 2]])
    weight = normal(6, 1).abs().requires_grad_()
    edges = af.EdgeSample.from_edge_index(edge_index, torch.tensor([0, 4]), weight)
    x = normal((4, 3), 2).requires_grad_()
    out, expected = fused(layer, x, edges), by_matrix(layer, x, edges)
    assert_near(out, expected, torch.float64)
    upstream = normal(out.shape, 3)
    for actual, wanted in zip(
        torch.autograd.grad(out, [x, weight], upstream, retain_graph=True),
        torch.autograd.grad(expected, [x, weight], upstream),
        strict=True,
    ):
        assert_near(actual, wanted, torch.float64)


@pytest.mark.parametrize("layer", LAYERS)
def test_equal_input_gives_equal_bits(layer):
    results = []
    for _ in range(2):
        edges, weight = random_edges([40, 30], symmetric=False, seed=5, dtype=torch.float32)
        x = normal((70, 24), 6, torch.float32).requires_grad_()
        out = fused(layer, x, edges)
        results.append((out, *torch.autograd.grad(out.square().sum(), [x, weight])))
    assert all(torch.equal(first, second) for first, second in zip(*results, strict=True))


@pytest.mark.parametrize("layer", LAYERS)
def test_strided_features_and_gradients(layer):
    edges, _ = random_edges([8], symmetric=True, seed=7)
    wide = normal((8, 10), 1)
    strided = wide[:, ::2].requires_grad_()
    packed = wide[:, ::2].clone().requires_grad_()
    upstream = normal((5, 8), 2).T
    (first,) = torch.autograd.grad(fused(layer, strided, edges), strided, upstream)
    (second,) = torch.autograd.grad(fused(layer, packed, edges), packed, upstream.contiguous())
    assert torch.equal(first, second)
    column = torch.stack([edges.value.detach()] * 2, 1)[:, 0]
    assert torch.equal(fused(layer, packed, edges.with_value(column)), fused(layer, packed, edges))


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(("x_dtype", "value_dtype"), list(itertools.permutations(DTYPES, 2)))
def test_values_take_the_dtype_of_the_features(layer, x_dtype, value_dtype):
    edges, weight = random_edges([6, 4], symmetric=True, seed=2, dtype=value_dtype)
    x = normal((10, 3), 1, x_dtype).requires_grad_()
    out = fused(layer, x, edges)
    assert_near(out, fused(layer, x, edges.with_value(edges.value.to(x_dtype), symmetric=True)).double(), x_dtype)
    out.sum().backward()
    assert weight.grad.dtype == value_dtype and weight.grad.any()


@pytest.mark.parametrize("spare", [None, 0, 6])
@pytest.mark.parametrize("sizes", [[], [1], [6, 1, 4]])
def test_transpose_of_directed_edges(sizes, spare):
    layout = af.PairLayout.complete(sizes, directed=True)
    draw = {"seed": 3, "estimator": "hard_concrete", "temperature": 0.2}
    logits = normal(layout.num_pairs, 1)
    count = af.sample_edges(logits, layout, **draw).num_edges
    edges = af.sample_edges(logits, layout, **draw, capacity=None if spare is None else count + spare)
    rowptr, col, entry = edges.transposed()
    assert rowptr.dtype == col.dtype == entry.dtype == torch.int32 and len(col) == len(entry) == len(edges.col)
    mirrored = [
        (int(col[e]), row, int(entry[e])) for row in range(sum(sizes)) for e in range(rowptr[row], rowptr[row + 1])
    ]
    assert sorted(mirrored) == entries(edges)
    assert [(row, col) for col, row, _ in mirrored] == sorted((row, col) for col, row, _ in mirrored)
    assert not col[count:].any()


@pytest.mark.parametrize("layer", LAYERS)
def test_spare_capacity_gets_zero_gradient(layer):
    layout = af.PairLayout.complete([6, 3], directed=True)
    sample = af.sample_edges(torch.zeros(layout.num_pairs), layout, seed=1, capacity=layout.num_pairs + 9)
    value = sample.value.clone().requires_grad_()
    x = normal((9, 4), 1, torch.float32)
    fused(layer, x, sample.with_value(value)).square().sum().backward()
    assert sample.num_edges < layout.num_pairs
    assert value.grad[: sample.num_edges].any() and not value.grad[sample.num_edges :].any()


@pytest.mark.parametrize("eps", [0.5, torch.tensor(0.5), torch.full((1, 1, 1), 0.5), torch.tensor([0.5]).bfloat16()])
def test_eps_in_every_form(eps):
    edges, _ = random_edges([5], symmetric=True, seed=1)
    x = normal((5, 2), 1)
    if isinstance(eps, torch.Tensor):
        eps = eps.clone().requires_grad_()
    out = af.gin_propagate(x, edges, eps)
    assert_near(out, dense_gin(dense(edges), x, 0.5).detach(), torch.float64)
    if isinstance(eps, torch.Tensor):
        out.sum().backward()
        assert eps.grad.shape == eps.shape and float(eps.grad) == pytest.approx(float(x.sum()), rel=1e-2)


@pytest.mark.parametrize("self_loops", [True, False])
def test_gcn_against_pytorch_geometric(self_loops):
    conv_class = pytest.importorskip("torch_geometric.nn", reason="torch-geometric is not installed").GCNConv
    # Without self loops PyG's gradient is NaN at nodes without an in-degree, so there are none.
    edges, weight = random_edges([7, 1, 6] if self_loops else [8, 6], symmetric=False, seed=8, density=0.6)
    x = normal((14, 3), 1).requires_grad_()
    conv = conv_class(3, 3, bias=False, add_self_loops=self_loops).double()
    torch.nn.init.eye_(conv.lin.weight)
    edge_index, edge_weight = edges.to_edge_index()
    upstream = normal((14, 3), 2)
    ours, theirs = af.gcn_propagate(x, edges, self_loops), conv(x, edge_index, edge_weight)
    torch.testing.assert_close(ours, theirs)
    for actual, expected in zip(
        torch.autograd.grad(ours, [x, weight], upstream, retain_graph=True),
        torch.autograd.grad(theirs, [x, weight], upstream),
        strict=True,
    ):
        torch.testing.assert_close(actual, expected)


def test_weighted_gin_against_pytorch_geometric():
    conv_class = pytest.importorskip("torch_geometric.nn", reason="torch-geometric is not installed").DenseGINConv
    edges, weight = random_edges([4, 7], symmetric=False, seed=9)
    conv = conv_class(torch.nn.Identity(), eps=0.2, train_eps=True).double()
    batch = af.GraphBatch(normal((11, 3), 1).requires_grad_(), edges)
    eps = torch.tensor([0.2], dtype=torch.float64, requires_grad=True)
    x, adjacency, mask = batch.to_dense()
    theirs = conv(x, adjacency, mask)[mask]
    ours = af.gin_propagate(batch.x, edges, eps)
    torch.testing.assert_close(ours, theirs, check_dtype=False)
    upstream = normal((11, 3), 2)
    for actual, expected in zip(
        torch.autograd.grad(ours, [batch.x, weight, eps], upstream, retain_graph=True),
        torch.autograd.grad(theirs, [batch.x, weight, conv.eps], upstream),
        strict=True,
    ):
        torch.testing.assert_close(actual, expected)


def loop_readout(x, ptr, mode):
    rows = []
    for first, last in itertools.pairwise(ptr.tolist()):
        graph = x[first:last]
        if first == last:
            rows.append(x.new_zeros(x.shape[1]))
        else:
            rows.append({"sum": graph.sum(0), "mean": graph.mean(0), "max": graph.amax(0)}[mode])
    return torch.stack(rows) if rows else x.new_zeros(0, x.shape[1])


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(0, 6), max_size=5),
    st.integers(0, 9),
    st.sampled_from(["sum", "mean", "max"]),
    st.sampled_from(DTYPES),
    st.integers(0, 1000),
)
def test_readout_against_plain_loops(sizes, width, mode, dtype, seed):
    """Without ties; empty graphs included."""
    ptr = torch.tensor([0, *itertools.accumulate(sizes)], dtype=torch.int64)
    x = normal((sum(sizes), width), seed, dtype).requires_grad_()
    wide = x.detach().double().requires_grad_()
    out, expected = af.readout(x, ptr, mode), loop_readout(wide, ptr, mode)
    assert_near(out, expected, dtype)
    upstream = normal(out.shape, seed + 1, dtype)
    distinct = mode != "max" or x.detach().flatten().unique().numel() == x.numel()
    if distinct and expected.requires_grad:
        (gradient,) = torch.autograd.grad(out, x, upstream)
        (wanted,) = torch.autograd.grad(expected, wide, upstream.double())
        assert_near(gradient, wanted, dtype)


def test_readout_gradcheck():
    x = normal((6, 3), 1).requires_grad_()
    ptr = torch.tensor([0, 2, 2, 6])
    for mode in ("sum", "mean", "max"):
        assert gradcheck(lambda features, mode=mode: af.readout(features, ptr, mode), (x,))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_maximum_goes_to_the_first_of_equals(dtype):
    x = torch.tensor([[1.0, -math.inf], [3.0, -math.inf], [3.0, -math.inf]], dtype=dtype, requires_grad=True)
    out = af.readout(x, torch.tensor([0, 3]), "max")
    out.backward(torch.tensor([[5.0, 7.0]], dtype=dtype))
    assert out.tolist() == [[3.0, -math.inf]]
    assert x.grad.tolist() == [[0.0, 7.0], [5.0, 0.0], [0.0, 0.0]]


GOOD_EDGES = random_edges([3, 2], symmetric=True, seed=0)[0]
BAD = [
    (lambda: af.gcn_propagate(torch.zeros(4, 2), GOOD_EDGES), r"x: expected a tensor of shape \(5, any\)"),
    (lambda: af.gin_propagate(torch.zeros(5), GOOD_EDGES), r"x: expected a tensor of shape \(5, any\)"),
    (
        lambda: af.gcn_propagate(torch.zeros(5, 2).half(), GOOD_EDGES),
        "x: expected dtype float32 or float64 or bfloat16",
    ),
    (lambda: af.gin_propagate(torch.zeros(5, 2, dtype=torch.int64), GOOD_EDGES), "x: expected dtype float32"),
    (lambda: af.gcn_propagate(torch.zeros(5, 2, device="meta"), GOOD_EDGES), "x: expected a tensor on cpu"),
    (lambda: af.gcn_propagate([[0.0]] * 5, GOOD_EDGES), "x: expected a torch.Tensor"),
    (lambda: af.gcn_propagate(torch.zeros(5, 2), torch.zeros(2, 4)), "edges: expected an EdgeSample"),
    (lambda: af.gin_propagate(torch.zeros(5, 2), GOOD_EDGES, torch.zeros(2)), "eps: expected a number or a tensor"),
    (lambda: af.gin_propagate(torch.zeros(5, 2), GOOD_EDGES, "0.5"), "eps: expected a number or a tensor"),
    (lambda: af.readout(torch.zeros(5, 2), GOOD_EDGES.ptr, "median"), "mode: expected one of sum, mean, max"),
    (lambda: af.readout(torch.zeros(5), GOOD_EDGES.ptr), r"x: expected a tensor of shape \(any, any\)"),
    (lambda: af.readout(torch.zeros(5, 2), GOOD_EDGES.ptr.int()), "ptr: expected dtype int64"),
    (lambda: af.readout(torch.zeros(6, 2), GOOD_EDGES.ptr), r"ptr: expected node offsets from 0 to 6, got \[0, 3, 5\]"),
    (lambda: af.readout(torch.zeros(5, 2), torch.tensor([1, 5])), "ptr: expected node offsets from 0 to 5"),
    (
        lambda: af.readout(torch.zeros(0, 2), torch.tensor([], dtype=torch.int64)),
        "ptr: expected node offsets from 0 to 0",
    ),
]


@pytest.mark.parametrize(("call", "text"), BAD, ids=[text[:45] for _, text in BAD])
def test_bad_arguments_are_named(call, text):
    with pytest.raises(af.InputError, match=f"^{text}") as caught:
        call()
    assert "\n" not in str(caught.value)
