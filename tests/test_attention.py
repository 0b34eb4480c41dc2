"""Graph attention against a dense softmax and against PyTorch Geometric."""

from __future__ import annotations

import pytest
import torch
from helpers import dense, random_edges

from acgkd_fast.edges import sample_edges
from acgkd_fast.errors import InputError
from acgkd_fast.graphs import EdgeSample
from acgkd_fast.layout import PairLayout
from acgkd_fast.nn import GATConv, gat_conv
from acgkd_fast.propagate import gat_propagate

SIZES = [5, 1, 17, 33]


@pytest.fixture(params=["fused", "composed"])
def path(request, monkeypatch):
    """One operator, or what runs with dropout, with edge features and for pairs of node sets."""
    called = []

    def fused(*arguments, **options):
        called.append(1)
        return gat_propagate(*arguments, **options)

    monkeypatch.setattr(gat_conv, "gat_propagate", fused)
    if request.param == "composed":
        monkeypatch.setattr(gat_conv, "_is_fused", lambda *_: False)
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
