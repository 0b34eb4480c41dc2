"""The layers beside those of PyTorch Geometric: initial weights, results and all gradients, in every option."""

from __future__ import annotations

import pytest
import torch
from helpers import normal
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import acgkd_fast.nn as ours
from acgkd_fast.errors import InputError
from acgkd_fast.nn import GATConv, GCNConv, GINConv, GINEConv, SAGEConv

pyg = pytest.importorskip("torch_geometric.nn")

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
EDGE_INDEX = torch.tensor([[0, 0, 0, 1, 2, 3], [1, 2, 3, 0, 0, 0]])


def mlp(before, width):
    return nn.Sequential(nn.Linear(before, width), nn.ReLU(), nn.Linear(width, width))


def edge_list(num_senders, num_receivers, num_edges, seed):
    generator = torch.Generator().manual_seed(seed)
    ends = [torch.randint(nodes, (num_edges,), generator=generator) for nodes in (num_senders, num_receivers)]
    return torch.stack(ends)


def answers(layer, x, args, kwargs):
    """Results, attention weights too, and gradients of the features and of all parameters."""
    leaves = [None if part is None else part.clone().requires_grad_() for part in (x if isinstance(x, tuple) else (x,))]
    torch.manual_seed(1)
    out = layer(tuple(leaves) if isinstance(x, tuple) else leaves[0], *args, **kwargs)
    out, attention = out if isinstance(out, tuple) else (out, None)
    wanted = [leaf for leaf in leaves if leaf is not None] + list(layer.parameters())
    upstream = normal(out.shape, 5, out.dtype)
    grads = torch.autograd.grad(out, wanted, upstream, allow_unused=True, materialize_grads=True)
    return [out, *grads, *([] if attention is None else [attention[1].detach()])]


def assert_same(make, x, *args, **kwargs):
    """Initial weights, results and gradients: to 1e-10 in float64; to 1e-5 in float32, in which long sums round."""
    layers = []
    first = x[0] if isinstance(x, tuple) else x
    close = {"rtol": 1e-10, "atol": 1e-10} if first.dtype == torch.float64 else CLOSE
    if close is CLOSE and isinstance(args[0], torch.Tensor) and args[0].layout == torch.strided:
        close = {"rtol": 1e-5, "atol": 1e-5 * max(1.0, args[0].shape[1] / (4 * max(first.shape[-2], 1)))}
    for library in (pyg, ours):
        torch.manual_seed(3)
        layers.append(make(library))
    theirs, mine = layers
    assert repr(mine) == repr(theirs)
    assert list(mine.state_dict()) == list(theirs.state_dict())
    for name, tensor in theirs.state_dict().items():
        torch.testing.assert_close(mine.state_dict()[name], tensor, rtol=1e-6, atol=0, msg=name)
    expected = answers(theirs.to(first.dtype), x, args, kwargs)
    for got, want in zip(answers(mine.to(first.dtype), x, args, kwargs), expected, strict=True):
        torch.testing.assert_close(got, want, **close)


FLOW = st.sampled_from(["source_to_target", "target_to_source"])
YES = st.booleans()


def options(**optional):
    """Any of the options of a layer together."""
    return st.fixed_dictionaries({}, optional=optional)


GCN = options(
    improved=YES, cached=YES, add_self_loops=st.sampled_from([None, True, False]), normalize=YES, bias=YES, flow=FLOW
).filter(lambda drawn: drawn.get("normalize", True) or not drawn.get("add_self_loops"))
SAGE = options(
    aggr=st.sampled_from(["mean", "add", "sum", "max", "min", ["mean", "std"], "softmax"]),
    **dict.fromkeys(("normalize", "root_weight", "project", "bias"), YES),
    flow=FLOW,
)
GAT = options(
    heads=st.integers(1, 3),
    negative_slope=st.sampled_from([0.0, 0.5]),
    dropout=st.sampled_from([0.0, 0.5]),
    **dict.fromkeys(("concat", "add_self_loops", "bias", "residual"), YES),
    flow=FLOW,
)
GIN = options(eps=st.sampled_from([-1.0, 0.3]), train_eps=YES, flow=FLOW)


@st.composite
def graphs(draw):
    """(features, edge index, width of the result) of any graph, repeated edges and self-loops too."""
    num_nodes, num_edges, seed = draw(st.integers(1, 9)), draw(st.integers(0, 40)), draw(st.integers(0, 99))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    return *graph(num_nodes, num_edges, draw(YES), seed, dtype), draw(st.integers(1, 6))


def graph(num_nodes, num_edges, symmetric, seed, dtype=torch.float32):
    edge_index = edge_list(num_nodes, num_nodes, num_edges, seed)
    if symmetric:
        edge_index = torch.cat([edge_index, edge_index.flip(0)], 1)
    return normal((num_nodes, 4), seed, dtype), edge_index


@settings(max_examples=60, deadline=None)
@given(graphs(), GCN, YES)
def test_gcn(drawn, options, weighted):
    x, edge_index, width = drawn
    weight = [torch.rand(edge_index.shape[1], dtype=x.dtype) + 0.1] if weighted else []
    assert_same(lambda library: library.GCNConv(4, width, **options), x, edge_index, *weight)


@settings(max_examples=60, deadline=None)
@given(graphs(), SAGE)
def test_sage(drawn, options):
    x, edge_index, width = drawn
    assert_same(lambda library: library.SAGEConv(4, width, **options), x, edge_index)


def test_sage_with_an_aggregation_that_has_parameters():
    x, edge_index = graph(6, 20, False, 0)
    by_receiver = edge_index[:, edge_index[1].argsort(stable=True)]
    assert_same(lambda library: library.SAGEConv(4, 3, aggr="lstm"), x, by_receiver)


@settings(max_examples=60, deadline=None)
@given(graphs(), GAT, YES)
def test_gat(drawn, options, attention):
    x, edge_index, width = drawn
    asked = {"return_attention_weights": True} if attention else {}
    assert_same(lambda library: library.GATConv(4, width, **options), x, edge_index, **asked)


@settings(max_examples=60, deadline=None)
@given(graphs(), st.sampled_from(["mean", "add", "max", "min", "mul", 0.5, (0.1, 0.2, 0.3)]))
def test_gat_with_edge_features(drawn, fill):
    x, edge_index, width = drawn
    attr = normal((edge_index.shape[1], 3), 1, x.dtype)
    fill = torch.tensor(fill, dtype=x.dtype) if isinstance(fill, tuple) else fill
    assert_same(lambda library: library.GATConv(4, width, heads=2, edge_dim=3, fill_value=fill), x, edge_index, attr)
    assert_same(lambda library: library.GATConv(4, width, edge_dim=1), x, edge_index, attr[:, 0])


@settings(max_examples=60, deadline=None)
@given(graphs(), GIN)
def test_gin_and_gine(drawn, options):
    x, edge_index, width = drawn
    attr = normal((edge_index.shape[1], 4), 1, x.dtype)
    assert_same(lambda library: library.GINConv(mlp(4, width), **options), x, edge_index)
    assert_same(lambda library: library.GINEConv(mlp(4, width), **options), x, edge_index, attr)
    narrow = {"edge_dim": 2, **options}
    assert_same(lambda library: library.GINEConv(mlp(4, width), **narrow), x, edge_index, attr[:, :2])


@pytest.mark.parametrize("receivers", [3, 8, 12])
def test_bipartite(receivers):
    senders, edges = 8, 20
    x = normal((senders, 4), 0, torch.float32)
    other, same = normal((receivers, 5), 1, torch.float32), normal((receivers, 4), 2, torch.float32)
    edge_index, size = edge_list(senders, receivers, edges, 3), (senders, receivers)
    for options in ({}, {"aggr": "max"}, {"aggr": "add"}, {"project": True}, {"aggr": "softmax"}):

        def sage(library, options=options):
            return library.SAGEConv((4, 5), 6, **options)

        assert_same(sage, (x, other), edge_index)
        assert_same(sage, (x, other), edge_index, size=size)
        assert_same(sage, (x, None), edge_index, size=size)
    attr = normal((edges, 4), 4, torch.float32)
    assert_same(lambda library: library.GINConv(mlp(4, 3)), (x, same), edge_index)
    assert_same(lambda library: library.GINConv(mlp(4, 3)), (x, None), edge_index, size)
    assert_same(lambda library: library.GINEConv(mlp(4, 3)), (x, same), edge_index, attr)
    assert_same(lambda library: library.GINEConv(mlp(4, 3)), (x, None), edge_index, attr, size)
    for layer in (lambda library: library.GATConv((4, 5), 3, heads=2, residual=True),):
        assert_same(layer, (x, other), edge_index, return_attention_weights=True)
        assert_same(layer, (x, None), edge_index, size=size)
    assert_same(lambda library: library.GATConv(4, 3, heads=2), (x, same), edge_index)


def test_several_feature_sets_on_one_graph():
    x, edge_index = normal((3, 8, 4), 0, torch.float32), edge_list(8, 8, 20, 1)
    weight, attr = torch.rand(20), normal((20, 4), 2, torch.float32)
    assert_same(lambda library: library.GCNConv(4, 3), x, edge_index, weight)
    assert_same(lambda library: library.GINConv(mlp(4, 3)), x, edge_index)
    assert_same(lambda library: library.GINEConv(mlp(4, 3)), x, edge_index, attr)
    for aggr in ("mean", "max"):
        assert_same(lambda library, aggr=aggr: library.SAGEConv(4, 3, aggr=aggr), x, edge_index)
    with pytest.raises(InputError, match="static graphs are not supported in GATConv"):
        GATConv(4, 3)(x, edge_index)


@pytest.mark.filterwarnings("ignore:Converting sparse tensor:UserWarning", "ignore:Sparse:UserWarning")
@pytest.mark.parametrize("layout", ["coo", "csr", "csc"])
def test_torch_sparse_matrices(layout):
    """Rows receive, as in PyTorch Geometric; its GAT, GIN on CSC and others differ in what they do with values."""
    x = normal((4, 4), 0, torch.float32)
    ones, weight = torch.ones(6), torch.rand(6) + 0.5

    def matrix(value):
        sparse = torch.sparse_coo_tensor(EDGE_INDEX.flip(0), value, (4, 4)).coalesce()
        return {"coo": sparse.coalesce, "csr": sparse.to_sparse_csr, "csc": sparse.to_sparse_csc}[layout]()

    if layout != "csc":
        for options in ({}, {"improved": True}, {"add_self_loops": False}, {"normalize": False}, {"cached": True}):
            assert_same(lambda library, o=options: library.GCNConv(4, 3, **o), x, matrix(weight))
        assert_same(lambda library: library.GINConv(mlp(4, 3)), x, matrix(weight))
        assert_same(lambda library: library.SAGEConv(4, 3), x, matrix(ones))
        assert_same(lambda library: library.GATConv(4, 3, heads=2), x, matrix(ones))
    for layer in (GCNConv(4, 3), GINConv(mlp(4, 3)), SAGEConv(4, 3), GATConv(4, 3)):
        name = {} if not isinstance(layer, GATConv) else {"edge_weight": weight}
        listed = layer(x, EDGE_INDEX, **name) if name else layer(x, EDGE_INDEX, weight)
        torch.testing.assert_close(layer(x, matrix(weight)), listed, **CLOSE)
    out, (sparse, alpha) = GATConv(4, 3, heads=2)(x, matrix(ones), return_attention_weights=True)
    assert out.shape == (4, 6) and sparse.shape == (4, 4, 2) and alpha.shape == (10, 2)


@pytest.mark.filterwarnings("ignore:Converting sparse tensor:UserWarning", "ignore:Sparse:UserWarning")
@pytest.mark.parametrize("receivers", [3, 8, 12])
def test_bipartite_matrices(receivers):
    """Receivers without features are as many as the matrix has rows, also those that nobody sends to."""
    x, other = normal((8, 4), 0, torch.float32), normal((receivers, 5), 1, torch.float32)
    edge_index = torch.stack([torch.arange(8), torch.arange(8) % 2])
    ones = torch.sparse_coo_tensor(edge_index.flip(0), torch.ones(8), (receivers, 8)).coalesce()
    fake = FakeSparseTensor(edge_index[1], edge_index[0], None, (receivers, 8))
    makers = [
        (lambda library: library.SAGEConv((4, 5), 6), other),
        (lambda library: library.SAGEConv((4, 5), 6, aggr="max"), other),
        (lambda library: library.GATConv((4, 5), 3, heads=2, residual=True), other),
        (lambda library: library.GINConv(mlp(4, 3)), normal((receivers, 4), 2, torch.float32)),
    ]
    for make, own in makers:
        layer = make(ours)
        for pair in ((x, own), (x, None)):
            assert_same(make, pair, ones.to_sparse_csr())
            torch.testing.assert_close(layer(pair, fake), layer(pair, edge_index, size=(8, receivers)), **CLOSE)


class FakeSparseTensor:
    """The part of torch-sparse's class that layers touch; the real one is tested where it is installed."""

    def __init__(self, row, col, value, sparse_sizes):
        self.parts, self.sizes = (row, col, value), sparse_sizes

    def coo(self):
        return self.parts

    def sparse_sizes(self):
        return self.sizes


def sparse_tensor_classes():
    try:
        from torch_sparse import SparseTensor
    except ImportError:
        return [FakeSparseTensor]
    return [FakeSparseTensor, SparseTensor]


@pytest.mark.parametrize("kind", sparse_tensor_classes())
def test_sparse_tensors(kind):
    """Values are weights; where GCN adds self-loops it replaces those of the matrix, as PyTorch Geometric does."""
    x, weight = normal((4, 4), 0, torch.float32), torch.rand(6) + 0.5
    order = torch.argsort(EDGE_INDEX[1] * 4 + EDGE_INDEX[0])
    row, col = EDGE_INDEX[1, order], EDGE_INDEX[0, order]
    for value in (None, weight[order]):
        adjacency = kind(row=row, col=col, value=value, sparse_sizes=(4, 4))
        listed = [] if value is None else [weight]
        for layer in (GCNConv(4, 3), GINConv(mlp(4, 3)), SAGEConv(4, 3), SAGEConv(4, 3, aggr="max")):
            torch.testing.assert_close(layer(x, adjacency), layer(x, EDGE_INDEX, *listed), **CLOSE)
        layer = GATConv(4, 3, heads=2)
        result, attention = layer(x, adjacency, return_attention_weights=True)
        weights = {} if value is None else {"edge_weight": weight}
        torch.testing.assert_close(result, layer(x, EDGE_INDEX, **weights), **CLOSE)
        assert type(attention) is kind
    attr = normal((6, 4), 1, torch.float32)
    layer = GINEConv(mlp(4, 3))
    features = kind(row=row, col=col, value=attr[order], sparse_sizes=(4, 4))
    torch.testing.assert_close(layer(x, features), layer(x, EDGE_INDEX, attr), **CLOSE)

    own = torch.arange(4)
    with_loops = kind(
        row=torch.cat([row, own]), col=torch.cat([col, own]), value=torch.full((10,), 0.5), sparse_sizes=(4, 4)
    )
    layer = GCNConv(4, 3)
    torch.testing.assert_close(layer(x, with_loops), layer(x, EDGE_INDEX, torch.full((6,), 0.5)), **CLOSE)
    with pytest.raises(InputError, match="edge_weight: expected None beside a sparse matrix"):
        layer(x, with_loops, weight)


def test_edge_index_classes_and_integer_types():
    EdgeIndex = pytest.importorskip("torch_geometric").EdgeIndex
    x = normal((4, 4), 0, torch.float32)
    edges = EdgeIndex(EDGE_INDEX, sparse_size=(4, 4)).sort_by("col").values
    for layer in (GCNConv(4, 3), GINConv(mlp(4, 3)), SAGEConv(4, 3), SAGEConv(4, 3, aggr="max"), GATConv(4, 3)):
        expected = layer(x, EDGE_INDEX)
        torch.testing.assert_close(layer(x, edges), expected, **CLOSE)
        torch.testing.assert_close(layer(x, EDGE_INDEX.int()), expected, **CLOSE)


def test_widths_from_the_first_call():
    """-1 leaves a width to the first call; then weights, draws and results are PyTorch Geometric's."""
    x, other = normal((4, 4), 0, torch.float32), normal((4, 6), 1, torch.float32)
    makers = [
        (lambda library: library.GCNConv(-1, 3), x),
        (lambda library: library.SAGEConv(-1, 3), x),
        (lambda library: library.SAGEConv((-1, -1), 3), (x, other)),
        (lambda library: library.GATConv(-1, 3, heads=2, residual=True), x),
        (lambda library: library.GATConv((-1, -1), 3), (x, other)),
    ]
    for make, features in makers:
        layers = []
        for library in (pyg, ours):
            torch.manual_seed(0)
            layers.append(make(library))
            torch.manual_seed(1)
            layers[-1](features, EDGE_INDEX)
        theirs, mine = layers
        assert list(mine.state_dict()) == list(theirs.state_dict())
        mine.load_state_dict(theirs.state_dict())
        torch.testing.assert_close(mine(features, EDGE_INDEX), theirs(features, EDGE_INDEX), **CLOSE)
    fresh = GCNConv(-1, 3)
    fresh.load_state_dict(GCNConv(4, 3).state_dict())
    assert fresh.lin.weight.shape == (3, 4)


def test_gcn_keeps_what_it_cached():
    x, layer = normal((4, 4), 0, torch.float32), GCNConv(4, 3, cached=True)
    expected = layer(x, EDGE_INDEX)
    assert layer._cached_edge_index is not None and layer._cached_adj_t is None
    torch.testing.assert_close(layer(x, torch.zeros(2, 0).long()), expected, rtol=0, atol=0)
    layer.reset_parameters()
    assert layer._cached_edge_index is None


def test_gcn_takes_sparse_features():
    dense = torch.tensor([[1.0, 0, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0], [2, 0, 0, 1]])
    for layer in (GCNConv(4, 3), GCNConv(4, 6)):
        torch.testing.assert_close(layer(dense.to_sparse(), EDGE_INDEX), layer(dense, EDGE_INDEX), **CLOSE)


def test_no_nodes_and_no_edges():
    none = torch.empty(2, 0, dtype=torch.int64)
    for layer, width in ((GATConv(8, 32, heads=2), 64), (GCNConv(8, 5), 5), (SAGEConv(8, 5), 5)):
        assert layer(torch.zeros(0, 8), none).shape == (0, width)
        assert layer(torch.zeros(3, 8), none).shape == (3, width)


def test_hooks_on_a_linear_map_see_its_own_input():
    x, seen = normal((4, 4), 0, torch.float32), []
    gcn, sage = GCNConv(4, 6), SAGEConv(4, 2)
    for layer, lin in ((gcn, gcn.lin), (sage, sage.lin_l)):
        expected = layer(x, EDGE_INDEX)
        handle = lin.register_forward_hook(lambda _, args, out: seen.append(args[0]))
        torch.testing.assert_close(layer(x, EDGE_INDEX), expected, **CLOSE)
        handle.remove()
    assert seen[0] is x and seen[1].shape == x.shape


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: GCNConv(4, 3, normalize=False, add_self_loops=True), "does not support adding self-loops"),
        (lambda: GCNConv(4, 3)((torch.zeros(4, 4), None), EDGE_INDEX), "received a tuple"),
        (lambda: GCNConv(4, 3, aggr="max"), "aggr: expected add or sum"),
        (lambda: SAGEConv(4, 3, aggr="nonsense"), "aggr: expected an aggregation that torch-geometric knows"),
        (lambda: SAGEConv(-1, 3, project=True), "does not support lazy initialization"),
        (lambda: GATConv(4, 3, flow="sideways"), "flow: expected one of"),
        (lambda: GATConv(4, 3, heads=0), "heads: expected at least 1"),
        (lambda: GATConv(4, 3)(torch.zeros(4, 4), EDGE_INDEX, torch.ones(6)), "edge_attr: expected None in a layer"),
        (lambda: SAGEConv(4, 3)(torch.zeros(4, 4), EDGE_INDEX + 2), "edge_index: expected senders .* 0..3"),
        (lambda: SAGEConv(4, 3, aggr="max")(torch.zeros(4, 4), EDGE_INDEX + 2), "edge_index: expected senders"),
        (lambda: GATConv(4, 3)(torch.zeros(4, 4), EDGE_INDEX - 1), "edge_index: expected senders"),
        (lambda: GINEConv(nn.Linear(4, 3))(torch.zeros(4, 4), EDGE_INDEX), "edge_attr: expected edge features"),
        (
            lambda: GINEConv(nn.Linear(4, 3))(torch.zeros(4, 4), EDGE_INDEX, torch.zeros(6, 2)),
            "feature dimensionalities do not match",
        ),
        (lambda: GINEConv(nn.Linear(4, 3))(torch.zeros(4, 4), EDGE_INDEX, torch.zeros(5, 4)), "expected 6 rows"),
        (lambda: GINEConv(nn.ReLU(), edge_dim=2), "nn: expected a first layer with in_features"),
        (lambda: SAGEConv(4, 3)(torch.zeros(4, 4), EDGE_INDEX, size=(4, 9)), r"size: expected \(4, 4\)"),
        (lambda: GINConv(nn.Linear(4, 3))((torch.zeros(4, 4),), EDGE_INDEX), "x: expected a tensor, or a pair"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(InputError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
