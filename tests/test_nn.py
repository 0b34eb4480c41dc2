"""Layers and models against PyTorch Geometric and dense matrices."""

from __future__ import annotations

import pytest
import torch
from helpers import dense, dense_gcn, normal, random_edges
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import acgkd_fast as af
from acgkd_fast.errors import InputError
from acgkd_fast.nn import GCNConv, GINConv, build_model

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def random_edge_list(num_nodes, num_edges, seed, *, loops=True):
    generator = torch.Generator().manual_seed(seed)
    edge_index = torch.randint(num_nodes, (2, num_edges), generator=generator)
    if not loops:
        edge_index = edge_index[:, edge_index[0] != edge_index[1]]
    return edge_index, torch.rand(edge_index.shape[1], generator=generator) + 0.1


def mlp(before, width):
    return nn.Sequential(nn.Linear(before, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, width))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 9),
    st.integers(0, 40),
    st.tuples(st.integers(1, 5), st.integers(1, 5)),
    st.sampled_from([{}, {"normalize": False}, {"add_self_loops": False}, {"bias": False}]),
    st.booleans(),
    st.integers(0, 99),
)
def test_gcn_layer_is_torch_geometrics(num_nodes, num_edges, widths, options, weighted, seed):
    """Results and all gradients on directed edge lists with self-loops and repeated edges."""
    pyg = pytest.importorskip("torch_geometric.nn")
    edge_index, weight = random_edge_list(num_nodes, num_edges, seed)
    torch.manual_seed(seed)
    theirs, ours = pyg.GCNConv(*widths, **options), GCNConv(*widths, **options)
    ours.load_state_dict(theirs.state_dict())
    results = []
    for layer in (theirs, ours):
        x = normal((num_nodes, widths[0]), seed, torch.float32).requires_grad_()
        leaf = weight.clone().requires_grad_() if weighted else None
        out = layer(x, edge_index, leaf)
        leaves = [x, *layer.parameters(), *([leaf] if weighted else [])]
        upstream = normal(out.shape, seed + 1, torch.float32)
        results.append([out, *torch.autograd.grad(out, leaves, upstream, allow_unused=True, materialize_grads=True)])
    for actual, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(actual, expected, **CLOSE)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(0, 40), st.booleans(), st.integers(0, 99))
def test_gin_layer_is_torch_geometrics_and_adds_weights(num_nodes, num_edges, train_eps, seed):
    pyg = pytest.importorskip("torch_geometric.nn")
    edge_index, weight = random_edge_list(num_nodes, num_edges, seed)
    x = normal((num_nodes, 3), seed, torch.float32)
    theirs = pyg.GINConv(nn.Linear(3, 4), eps=0.3, train_eps=train_eps)
    ours = GINConv(nn.Linear(3, 4), train_eps=train_eps)
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours(x, edge_index), theirs(x, edge_index), **CLOSE)

    by_matrix = pyg.DenseGINConv(nn.Linear(3, 4), train_eps=train_eps)
    by_matrix.load_state_dict(theirs.state_dict())
    matrix = torch.zeros(num_nodes, num_nodes).index_put((edge_index[1], edge_index[0]), weight, accumulate=True)
    torch.testing.assert_close(ours(x, edge_index, weight), by_matrix(x, matrix)[0], **CLOSE)


@pytest.mark.parametrize("widths", [(3, 8), (8, 3), (4, 4)])
@pytest.mark.parametrize("bias", [True, False])
def test_initial_weights_are_torch_geometrics(widths, bias):
    pyg = pytest.importorskip("torch_geometric.nn")
    states = []
    for layer in (pyg.GCNConv, GCNConv):
        torch.manual_seed(5)
        states.append(layer(*widths, bias=bias).state_dict())
    assert list(states[0]) == list(states[1])
    for name, tensor in states[0].items():
        assert torch.equal(states[1][name], tensor), name
    states = []
    for layer in (pyg.GINConv, GINConv):
        torch.manual_seed(5)
        states.append(layer(mlp(*widths), eps=0.5).state_dict())
    assert list(states[0]) == list(states[1])
    for name, tensor in states[0].items():
        assert torch.equal(states[1][name], tensor), name


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("layer", [GCNConv(3, 5), GCNConv(5, 3), GINConv(nn.Linear(3, 4), eps=0.2, train_eps=True)])
def test_edge_sample_gives_what_its_edge_list_gives(layer, symmetric):
    edges, _ = random_edges([4, 1, 6], symmetric=symmetric, seed=3, dtype=torch.float32)
    width = getattr(layer, "in_channels", 3)
    x = normal((11, width), 0, torch.float32)
    edge_index, weight = edges.to_edge_index()
    torch.testing.assert_close(layer(x, edges), layer(x, edge_index, weight), **CLOSE)


def test_self_loops_of_an_edge_sample_are_kept_once():
    """Weight 0.5 at node 0 stays, nodes 1 and 2 get 1: not 1.5 and not two loops."""
    edge_index = torch.tensor([[0, 0, 1], [0, 1, 0]])
    edges = af.EdgeSample.from_edge_index(edge_index, torch.tensor([0, 3]), torch.tensor([0.5, 2.0, 2.0]))
    layer = GCNConv(2, 2)
    x = normal((3, 2), 0, torch.float32)
    filled = torch.tensor([[0.5, 2.0, 0.0], [2.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    torch.testing.assert_close(layer(x, edges), dense_gcn(filled, x @ layer.lin.weight.t(), False), **CLOSE)


@pytest.mark.parametrize("improved", [False, True])
@pytest.mark.parametrize("loops", [[], [1], [0, 1, 2, 3], [0, 1, 2, 2], [0, 1, 2, 3, 3]])
def test_self_loops_of_a_sample_and_of_a_list_are_one(loops, improved):
    """On no node, some, every node, and twice on one: value and gradient of every weight."""
    edge_index = torch.cat([torch.tensor([[0, 1, 3], [1, 2, 0]]), torch.tensor([loops, loops]).long()], 1)
    weight = normal(edge_index.shape[1], 1).abs() + 0.1
    layer, x, results = GCNConv(2, 2, improved=improved).double(), normal((4, 2), 0), []
    for sampled in (False, True):
        leaf = weight.clone().requires_grad_()
        given = (edge_index, leaf)
        if sampled:
            given = (af.EdgeSample.from_edge_index(edge_index, torch.tensor([0, 4]), leaf),)
        out = layer(x, *given)
        results.append([out, *torch.autograd.grad(out, leaf, normal(out.shape, 2))])
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("layer", [GCNConv(3, 5), GCNConv(5, 3), GINConv(nn.Linear(3, 4))])
def test_gradients_reach_absent_candidates(layer):
    """The straight-through slope at every pair, drawn or not, against a dense matrix of soft values."""
    layer = layer.double()
    layout = af.PairLayout.complete([5, 4])
    logits = normal(layout.num_pairs, 1).requires_grad_()
    x = normal((9, getattr(layer, "in_channels", 3)), 2)
    edges = af.sample_edges(logits, layout, seed=3, temperature=0.7)
    upstream = normal(layer(x, edges).shape, 4)
    (actual,) = torch.autograd.grad(layer(x, edges), logits, upstream)

    soft = af.sample_edges(logits, layout, seed=3, temperature=0.7, estimator="relaxed")
    hard = dense(edges).detach()
    slopes = dense(soft)
    matrix = hard + slopes - slopes.detach()
    if isinstance(layer, GCNConv):
        out = dense_gcn(matrix, x @ layer.lin.weight.t()) + layer.bias
    else:
        out = layer.nn(x + matrix @ x)
    (expected,) = torch.autograd.grad(out, logits, upstream)
    assert 0 < edges.num_edges < 2 * layout.num_pairs and (expected != 0).all()
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: GCNConv(0, 3), "in_channels: expected at least 1"),
        (lambda: GCNConv(3, 0), "out_channels: expected at least 1"),
        (lambda: GCNConv(3, 3, normalize=False, add_self_loops=True), "add_self_loops: expected False"),
        (lambda: GCNConv(3, 3)(torch.zeros(2, 4), torch.zeros(2, 0, dtype=torch.int64)), r"x: expected .*\(any, 3\)"),
        (lambda: GCNConv(3, 3)(torch.zeros(2, 3), [[0], [1]]), "edge_index: expected an EdgeSample, an int64"),
        (lambda: GCNConv(3, 3)(torch.zeros(2, 3), torch.zeros(2, 1)), "edge_index: expected dtype int64"),
        (
            lambda: GCNConv(3, 3)(torch.zeros(2, 3), torch.zeros(2, 1).long(), torch.ones(1).long()),
            "edge_weight: expected dtype float32",
        ),
        (
            lambda: GINConv(nn.Linear(3, 3))(torch.zeros(3), torch.zeros(2, 1).long()),
            r"x: expected .*\(\.\.\., any, any\)",
        ),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(InputError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_weights_beside_an_edge_sample_are_refused():
    edges, _ = random_edges([3], symmetric=True, seed=0, dtype=torch.float32)
    with pytest.raises(InputError, match="edge_weight: expected None beside an EdgeSample"):
        GCNConv(2, 2)(torch.zeros(3, 2), edges, edges.value)


# Models.


@pytest.mark.parametrize(
    ("arch", "parameters", "norms"),
    [("gcn5-64", 13634, 4), ("gin5-64", 30786, 8), ("gcn3-32", 1506, 2), ("gin3-32", 3746, 4)],
)
def test_parameter_counts_of_the_lineage(arch, parameters, norms):
    model = build_model(arch, 7, 2)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert sum(isinstance(layer, nn.BatchNorm1d) for layer in model.modules()) == norms
    assert model.arch == arch and model.width == int(arch.split("-")[1])


class GCNByPyG(nn.Module):
    """The lineage's GCN from torch-geometric's parts."""

    def __init__(self, features, width, depth, classes):
        super().__init__()
        from torch_geometric.nn import GCNConv

        widths = [features] + [width] * depth
        self.convs = nn.ModuleList(GCNConv(a, width) for a in widths[:-1])
        self.norms = nn.ModuleList(nn.BatchNorm1d(width) for _ in self.convs)
        self.classifier = nn.Linear(width, classes)

    def forward(self, x, edge_index, edge_weight, batch):
        from torch_geometric.nn import global_add_pool

        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            h = norm(conv(x, edge_index, edge_weight)).relu()
            x = h + x if i > 0 else h
        return self.classifier(global_add_pool(x, batch))


def randomise(model, seed=0):
    """Weights, running statistics and scales away from their initial values."""
    with torch.no_grad():
        for number, (name, tensor) in enumerate(model.state_dict().items()):
            if tensor.is_floating_point():
                draw = normal(tensor.shape, seed + number, torch.float32) * 0.3
                tensor.copy_(draw.abs() + 0.5 if name.endswith("running_var") else draw)
    return model


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("arch", ["gcn5-64", "gcn3-32", "gcn2-8"])
def test_gcn_classifier_is_the_same_model_from_torch_geometrics_parts(arch, training):
    pytest.importorskip("torch_geometric")
    model = randomise(build_model(arch, 7, 3, dropout=0.0)).train(training)
    peer = GCNByPyG(7, model.width, len(model.blocks), 3).train(training)
    names = {f"blocks.{i}.conv.": f"convs.{i}." for i in range(9)} | {
        f"blocks.{i}.norm.": f"norms.{i}." for i in range(9)
    }
    state = {}
    for name, tensor in model.state_dict().items():
        prefix = next((p for p in names if name.startswith(p)), "")
        state[names.get(prefix, "") + name.removeprefix(prefix)] = tensor
    peer.load_state_dict(state)
    edges, _ = random_edges([6, 1, 9], symmetric=True, seed=1, dtype=torch.float32)
    x = normal((16, 7), 2, torch.float32)
    graphs = af.GraphBatch(x, edges)
    expected = peer(x, *edges.to_edge_index(), graphs.batch())
    torch.testing.assert_close(model(x, edges), expected, **CLOSE)
    torch.testing.assert_close(model(x, *edges.to_edge_index(), graphs.batch()), expected, **CLOSE)


def test_gin_classifier_is_the_same_model_from_dense_parts():
    """Per graph by matrix products, in eval mode so that graphs do not see one another."""
    model = randomise(build_model("gin4-16", 5, 2)).eval()
    sizes = [6, 1, 9]
    edges, _ = random_edges(sizes, symmetric=False, seed=1, dtype=torch.float32)
    x = normal((16, 5), 2, torch.float32)
    expected, first = [], 0
    for n in sizes:
        h = x[first : first + n]
        matrix = dense(edges)[first : first + n, first : first + n]
        for i, block in enumerate(model.blocks):
            out = block.norm(block.conv.nn((1 + block.conv.eps) * h + matrix @ h)).relu()
            h = out + h if i > 0 else out
        expected.append(model.classifier(h.sum(0)))
        first += n
    torch.testing.assert_close(model(x, edges), torch.stack(expected), **CLOSE)


@pytest.mark.parametrize("readout", ["sum", "mean", "max"])
@pytest.mark.parametrize("arch", ["gcn3-8", "gin3-8"])
def test_forward_is_node_features_then_classify(arch, readout):
    model = randomise(build_model(arch, 4, 3, readout=readout)).eval()
    edges, _ = random_edges([3, 5, 2], symmetric=True, seed=0, dtype=torch.float32)
    x = normal((10, 4), 0, torch.float32)
    h = model.node_features(x, edges)
    assert h.shape == (10, 8)
    parts = h.split([3, 5, 2])
    pooled = torch.stack([{"sum": p.sum(0), "mean": p.mean(0), "max": p.max(0).values}[readout] for p in parts])
    torch.testing.assert_close(model(x, edges), model.classifier(pooled), **CLOSE)
    torch.testing.assert_close(model.classify(h, edges.ptr), model(x, edges), rtol=0, atol=0)


@pytest.mark.parametrize("arch", ["gcn3-8", "gin3-8"])
def test_classes_do_not_depend_on_node_order(arch):
    model = randomise(build_model(arch, 4, 2)).eval()
    edge_index, _ = random_edge_list(7, 12, 0, loops=False)
    x = normal((7, 4), 0, torch.float32)
    order = torch.tensor([3, 0, 6, 1, 5, 2, 4])
    moved = torch.empty_like(x)
    moved[order] = x
    torch.testing.assert_close(model(moved, order[edge_index]), model(x, edge_index), **CLOSE)


def test_dropout_acts_on_the_logits_in_training_only():
    model = randomise(build_model("gcn2-8", 2, 50, dropout=0.5))
    edges, _ = random_edges([5, 5], symmetric=True, seed=0, dtype=torch.float32)
    x = normal((10, 2), 0, torch.float32)
    model.train()
    torch.manual_seed(0)
    dropped = model(x, edges) == 0
    assert 20 < int(dropped.sum()) < 80
    model.eval()
    assert (model(x, edges) != 0).all() and torch.equal(model(x, edges), model(x, edges))


@pytest.mark.parametrize("arch", ["gcn", "gcn5", "gat5-64", "gcn1-64", "gcn3-0", "gcn5-64 ", 5])
def test_unknown_architectures_are_named(arch):
    with pytest.raises(InputError, match=r"arch: expected gcn or gin, .* as in gcn5-64, got"):
        build_model(arch, 7, 2)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((0, 2), {}, "num_features"),
        ((7, 0), {}, "num_classes"),
        ((7, 2), {"readout": "attention"}, "readout: expected one of sum, mean, max"),
        ((7, 2), {"dropout": 1.0}, "dropout"),
    ],
)
def test_bad_model_settings_are_named(arguments, options, message):
    with pytest.raises(InputError, match=message):
        build_model("gcn3-8", *arguments, **options)


def test_bad_batches_are_named():
    model = build_model("gcn3-8", 4, 2)
    edges, _ = random_edges([3], symmetric=True, seed=0, dtype=torch.float32)
    edge_index, x = edges.to_edge_index()[0], torch.zeros(3, 4)
    with pytest.raises(InputError, match=r"x: expected a tensor of shape \(any, 4\)"):
        model(torch.zeros(3, 5), edges)
    with pytest.raises(InputError, match="batch: expected graph numbers from 0 in ascending order"):
        model(x, edge_index, None, torch.tensor([0, 1, 0]))
    with pytest.raises(InputError, match=r"batch: expected a tensor of shape \(3\)"):
        model(x, edge_index, None, torch.tensor([0, 0]))
    with pytest.raises(InputError, match="batch: expected None beside an EdgeSample"):
        model(x, edges, None, torch.zeros(3).long())
    # A batch vector in the place of the weights, as PyTorch Geometric users may write it.
    with pytest.raises(InputError, match="edge_weight: expected dtype float32"):
        model(x, edge_index, torch.zeros(3).long())
