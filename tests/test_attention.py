"""Graph attention against a dense softmax and against PyTorch Geometric."""

from __future__ import annotations

import pytest
import torch
from helpers import dense, random_edges

from acgkd_fast.edges import sample_edges
from acgkd_fast.errors import InputError
from acgkd_fast.graphs import EdgeSample
from acgkd_fast.layout import PairLayout
from acgkd_fast.nn import GATConv, GCNConv, attention
from acgkd_fast.propagate import gat_propagate

SIZES = [5, 1, 17, 33]


@pytest.fixture(params=["fused", "composed"])
def path(request, monkeypatch):
    """One operator, or what runs with dropout, with edge features and for pairs of node sets."""
    called = []

    def fused(*arguments, **options):
        called.append(1)
        return gat_propagate(*arguments, **options)

    monkeypatch.setattr(attention, "gat_propagate", fused)
    if request.param == "composed":
        monkeypatch.setattr(attention, "_is_fused", lambda *_: False)
    yield request.param
    assert bool(called) == (request.param == "fused")


def dense_attention(layer: GATConv, x: torch.Tensor, adjacency: torch.Tensor) -> torch.Tensor:
    """The formula of the docstring on whole matrices, without the shift by the largest score."""
    h = (x @ layer.lin.weight.T).view(len(x), layer.heads, layer.out_channels)
    weight = adjacency * (1 - torch.eye(len(x), dtype=x.dtype)) + torch.eye(len(x), dtype=x.dtype)
    parts = []
    for head in range(layer.heads):
        source = h[:, head] @ layer.att_src[0, head]
        target = h[:, head] @ layer.att_dst[0, head]
        score = target[:, None] + source[None, :]
        score = torch.where(score > 0, score, layer.negative_slope * score)
        share = weight * score.exp()
        parts.append(share / share.sum(1, keepdim=True) @ h[:, head])
    return torch.cat(parts, 1) + layer.bias


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("heads", [1, 3])
def test_values_and_gradients_are_those_of_a_dense_softmax(path, heads, symmetric):
    torch.manual_seed(0)
    layer = GATConv(6, 4, heads=heads).double()
    torch.nn.init.normal_(layer.bias)
    edges, weight = random_edges(SIZES, symmetric=symmetric, seed=1)
    x = torch.randn(sum(SIZES), 6, dtype=torch.float64, requires_grad=True)
    leaves = [x, weight, *layer.parameters()]
    target = torch.randn(sum(SIZES), 4 * heads, dtype=torch.float64)
    out, expected = layer(x, edges), dense_attention(layer, x, dense(edges))
    torch.testing.assert_close(out, expected)
    ours = torch.autograd.grad((out * target).sum(), leaves, retain_graph=True)
    theirs = torch.autograd.grad((expected * target).sum(), leaves)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)
        assert one.abs().max() > 0
    assert torch.equal(layer(x, edges), out)


def test_gradcheck(path):
    torch.manual_seed(0)
    layer = GATConv(3, 2, heads=2).double()
    edges, weight = random_edges([4, 3], symmetric=False, seed=2)
    x = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    weight = weight.detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: layer(x, edges.with_value(w)), (x, weight))


def test_pytorch_geometric_has_the_same_layer(path):
    nn = pytest.importorskip("torch_geometric.nn")
    torch.manual_seed(0)
    theirs = nn.GATConv(5, 4, heads=2)
    ours = GATConv(5, 4, heads=2)
    ours.load_state_dict(theirs.state_dict())
    edge_index = torch.unique(torch.randint(0, 20, (2, 60)), dim=1)
    assert (edge_index[0] == edge_index[1]).any()
    x = torch.randn(21, 5)
    torch.testing.assert_close(ours(x, edge_index), theirs(x, edge_index))


EDGE_INDEX = torch.unique(torch.randint(0, 20, (2, 70), generator=torch.Generator().manual_seed(4)), dim=1)
UNSORTED = EDGE_INDEX[:, torch.randperm(EDGE_INDEX.shape[1], generator=torch.Generator().manual_seed(5))]
NO_LOOPS = EDGE_INDEX[:, EDGE_INDEX[0] != EDGE_INDEX[1]]
ROWS = torch.tensor([0, 20])


def tied(dtype: torch.dtype) -> EdgeSample:
    """Both directions of every edge, and self-loops."""
    both = torch.cat([EDGE_INDEX, EDGE_INDEX.flip(0)], 1)
    weight = 0.1 + (both[0] * both[1] % 7).to(dtype)
    both, place = torch.unique(both, dim=1, return_inverse=True)
    return EdgeSample.from_edge_index(
        both, ROWS, torch.ones(both.shape[1], dtype=dtype).scatter(0, place, weight), symmetric=True
    )


@pytest.mark.parametrize(
    ("options", "edges", "weighted"),
    [
        ({}, UNSORTED, False),
        ({}, UNSORTED, True),
        ({}, NO_LOOPS, True),
        ({"flow": "target_to_source"}, UNSORTED, True),
        ({"add_self_loops": False}, EDGE_INDEX, True),
        ({"concat": False, "residual": True}, UNSORTED, True),
        ({"bias": False}, UNSORTED, True),
        ({}, "tied with loops", False),
        ({"add_self_loops": False}, "tied with loops", False),
    ],
    ids=lambda value: "list" if isinstance(value, torch.Tensor) else str(value),
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_fused_and_composed_agree(monkeypatch, options, edges, weighted, dtype):
    torch.manual_seed(0)
    layer = GATConv(5, 4, heads=3, **options).to(dtype)
    x = torch.randn(20, 5, dtype=dtype, requires_grad=True)
    weight = (torch.rand(UNSORTED.shape[1], dtype=dtype) + 0.1).requires_grad_()
    leaves = [x, *layer.parameters()]
    if isinstance(edges, str):
        sample = tied(dtype)
        leaves.append(sample.value.requires_grad_())
        call = lambda: layer(x, sample)  # noqa: E731
    else:
        given = weight[: edges.shape[1]] if weighted else None
        leaves += [weight] if weighted else []
        call = lambda: layer(x, edges, edge_weight=given)  # noqa: E731
    found = []
    for fused in (True, False):
        if not fused:
            monkeypatch.setattr(attention, "_is_fused", lambda *_: False)
        out = call()
        upstream = torch.linspace(-1, 1, out.numel(), dtype=dtype).view(out.shape)
        found.append([out, *torch.autograd.grad(out, leaves, upstream, retain_graph=True)])
    tolerance = {} if dtype == torch.float64 else {"rtol": 0.1, "atol": 0.1}
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, **tolerance)


@pytest.mark.parametrize("layer", [GATConv(5, 4, heads=3, bias=False), GCNConv(5, 4, bias=False)], ids=str)
def test_results_may_be_written_to(layer):
    """The operator keeps its result for backward; a layer without bias must not hand that one out."""
    x = torch.randn(20, 5, requires_grad=True)
    (expected,) = torch.autograd.grad(torch.relu(layer(x, UNSORTED)).sum(), x)
    (found,) = torch.autograd.grad(torch.relu_(layer(x, UNSORTED)).sum(), x)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("scale", [1e-30, 1e3])
def test_extreme_scores_stay_finite(path, scale):
    layer = GATConv(2, 3)
    edges, _ = random_edges([6, 9], symmetric=True, seed=3, dtype=torch.float32)
    x = (scale * torch.randn(15, 2)).requires_grad_()
    out = layer(x, edges)
    out.sum().backward()
    assert out.isfinite().all() and x.grad.isfinite().all()


def test_nodes_without_edges_and_graphs_without_nodes(path):
    layer = GATConv(2, 3)
    x = torch.randn(4, 2)
    nothing = torch.empty(2, 0, dtype=torch.int64)
    torch.testing.assert_close(layer(x, nothing), layer.lin(x) + layer.bias)
    assert layer(x[:0], nothing).shape == (0, 3)
    spread = EdgeSample.from_edge_index(torch.tensor([[1, 2], [2, 1]]), torch.tensor([0, 1, 1, 4]))
    assert layer(x, spread).isfinite().all()


def test_weight_zero_is_no_edge_and_unused_capacity_does_not_count(path):
    layer = GATConv(2, 3)
    x = torch.randn(5, 2)
    edge_index = torch.tensor([[0, 1, 2, 3], [1, 0, 3, 2]])
    weight = torch.tensor([1.0, 1.0, 0.0, 0.0])
    torch.testing.assert_close(layer(x, edge_index, edge_weight=weight), layer(x, edge_index[:, :2]))
    layout = PairLayout.complete([5])
    logits = torch.randn(layout.num_pairs)
    exact = sample_edges(logits, layout, seed=1)
    roomy = sample_edges(logits, layout, seed=1, capacity=40)
    torch.testing.assert_close(layer(x, roomy), layer(x, exact))


@pytest.mark.parametrize(
    ("name", "arguments"), [("in_channels", (0, 2, 1)), ("out_channels", (2, 0, 1)), ("heads", (2, 2, 0))]
)
def test_widths_that_cannot_be(name, arguments):
    with pytest.raises(InputError, match=f"{name}: expected at least 1.*, got 0"):
        GATConv(*arguments[:2], heads=arguments[2])
    with pytest.raises(InputError, match="x: expected a tensor of shape"):
        GATConv(3, 2)(torch.zeros(2, 4), torch.empty(2, 0, dtype=torch.int64))
