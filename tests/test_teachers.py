"""Teachers of every make behind one call, and their evaluation."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import normal, random_edges
from torch import nn

import acgkd_fast as af
from acgkd_fast.errors import InputError
from acgkd_fast.nn import GCNConv, build_model
from acgkd_fast.teachers import Teacher, as_teacher, call_convention, evaluate


def hard_graphs(sizes=(5, 1, 7), width=4, seed=0, classes=2):
    edges, _ = random_edges(list(sizes), symmetric=True, seed=seed, dtype=torch.float32)
    edges = edges.with_value(torch.ones_like(edges.value).detach(), symmetric=True)
    return af.GraphBatch(normal((sum(sizes), width), seed, torch.float32), edges, torch.arange(len(sizes)) % classes)


class Base(nn.Module):
    """A classifier from our layers, which take edge weights; the subclasses differ in `forward` alone."""

    conv_type = staticmethod(lambda: GCNConv(4, 6))

    def __init__(self):
        super().__init__()
        self.conv = self.conv_type()
        self.norm = nn.BatchNorm1d(6)
        self.linear = nn.Linear(6, 3)

    def answer(self, x, edge_index, batch, weight=None):
        h = self.norm(self.conv(x, edge_index, weight)).relu()
        return self.linear(torch.zeros(int(batch.max()) + 1, 6).index_add(0, batch, h))


class ThreeArguments(Base):
    def forward(self, x, edge_index, batch):
        return self.answer(x, edge_index, batch)


class EdgeWeight(Base):
    def forward(self, x, edge_index, edge_weight=None, batch=None):
        return self.answer(x, edge_index, batch, edge_weight)


class EdgeAttr(Base):
    def forward(self, x, edge_index, batch, edge_attr):
        return self.answer(x, edge_index, batch, edge_attr)


class IgnoresWeights(Base):
    def forward(self, x, edge_index, edge_weight=None, batch=None):
        return self.answer(x, edge_index, batch)


class PyGData(Base):
    def forward(self, data):
        return self.answer(data.x, data.edge_index, data.batch)


class PyGDataWithWeights(Base):
    def forward(self, batch):
        return self.answer(batch.x, batch.edge_index, batch.batch, batch.edge_weight)


class TakesEdges(Base):
    def forward(self, x, edges):
        batch = torch.arange(edges.num_graphs).repeat_interleave(edges.ptr[1:] - edges.ptr[:-1])
        return self.answer(x, edges, batch)


class KeywordsInAnyOrder(Base):
    def forward(self, *, batch_index, features, edge_index, edge_weights):
        return self.answer(features, edge_index, batch_index, edge_weights)


class PositionsOnly(Base):
    def forward(self, edge_index, x, batch, num_graphs, /):
        assert num_graphs == int(batch.max()) + 1
        return self.answer(x, edge_index, batch)


class GraphFirst(Base):
    """As DGL's models are called; the weights lie on the graph."""

    def forward(self, g, feat):
        batch = torch.arange(g.batch_size).repeat_interleave(g.batch_num_nodes())
        return self.answer(feat, torch.stack(g.edges()), batch, g.edata["weight"])


class GraphAndWeight(Base):
    def forward(self, graph, x, edge_weight=None):
        batch = torch.arange(graph.batch_size).repeat_interleave(graph.batch_num_nodes())
        return self.answer(x, torch.stack(graph.edges()), batch, edge_weight)


class Padded(Base):
    """The same layer on a dense batch, as DiffPool and other dense models are called."""

    def forward(self, x, adj, mask):
        full = adj + torch.eye(adj.shape[-1])
        scale = full.sum(-1, keepdim=True).rsqrt()
        h = scale * full @ (scale * self.conv.lin(x)) + self.conv.bias
        h = self.norm(h.transpose(1, 2)).transpose(1, 2).relu()
        return self.linear((h * mask[:, :, None]).sum(1))


class Unknown(Base):
    def forward(self, graph, features):
        return self.answer(features, graph, torch.zeros(len(features)).long())


class Adjacency(nn.Module):
    """Dense: (x [B, n, F], adjacency [B, n, n], mask), in one argument too many."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x, adjacency, mask, scale):
        return (self.linear(x + scale * adjacency @ x) * mask[:, :, None]).sum(1)


FORMS = [
    (ThreeArguments, False),
    (EdgeWeight, True),
    (EdgeAttr, True),
    (IgnoresWeights, False),
    (PyGData, False),
    (PyGDataWithWeights, True),
    (TakesEdges, True),
    (KeywordsInAnyOrder, True),
    (PositionsOnly, False),
    (GraphFirst, True),
    (GraphAndWeight, True),
    (Padded, True),
]


@pytest.mark.parametrize(("form", "weighted"), FORMS)
def test_every_form_of_forward_is_found(form, weighted):
    if form in (PyGData, PyGDataWithWeights):
        pytest.importorskip("torch_geometric")
    module = form()
    graphs = hard_graphs()
    teacher = as_teacher(module)
    assert (teacher.num_features, teacher.num_classes, teacher.accepts_edge_weight) == (4, 3, weighted)
    assert teacher.module is module and teacher.batch_norms == [module.norm]
    expected = module.answer(graphs.x, graphs.to_edge_index()[0], graphs.batch())
    torch.testing.assert_close(teacher(graphs), expected)
    assert not module.training and not any(p.requires_grad for p in module.parameters())


@pytest.mark.parametrize(("form", "weighted"), FORMS)
def test_gradients_reach_features_and_weights_but_no_parameter(form, weighted):
    if form in (PyGData, PyGDataWithWeights):
        pytest.importorskip("torch_geometric")
    teacher, graphs = as_teacher(form()), hard_graphs()
    graphs.x.requires_grad_()
    value = graphs.edges.value.clone().requires_grad_()
    soft = af.GraphBatch(graphs.x, graphs.edges.with_value(value))
    teacher(soft).square().sum().backward()
    assert graphs.x.grad.abs().sum() > 0
    assert (value.grad is not None and bool((value.grad != 0).any())) is weighted
    assert all(p.grad is None for p in teacher.module.parameters())


def test_a_module_without_weights_sees_drawn_edges_only():
    teacher, graphs = as_teacher(ThreeArguments()), hard_graphs()
    extra = torch.tensor([[0, 4, 6, 12], [4, 0, 12, 6]])
    edge_index, weight = graphs.to_edge_index()
    with_absent = af.EdgeSample.from_edge_index(
        torch.cat([edge_index, extra], dim=1), graphs.ptr, torch.cat([weight, torch.zeros(4)])
    )
    torch.testing.assert_close(teacher(af.GraphBatch(graphs.x, with_absent)), teacher(graphs))
    soft = graphs.edges.with_value(graphs.edges.value * 0.5)
    with pytest.raises(InputError, match="edge values 0 or 1"):
        teacher(af.GraphBatch(graphs.x, soft))


def test_an_adapter_serves_any_other_form():
    graphs = hard_graphs()
    module = Adjacency()
    with pytest.raises(
        InputError, match=r"got forward\(x, adjacency, mask, scale\) of Adjacency; give an adapter such as call="
    ):
        as_teacher(module)
    teacher = as_teacher(module, call=lambda module, graphs: module(*graphs.to_dense(), 1.0))
    assert (teacher.num_features, teacher.num_classes, teacher.accepts_edge_weight) == (4, 3, True)
    torch.testing.assert_close(teacher(graphs), module(*graphs.to_dense(), 1.0))
    with pytest.raises(InputError, match=r"forward\(graph, features\) of Unknown"):
        as_teacher(Unknown())


def test_a_graph_classifier_needs_no_probe():
    model = build_model("gin3-8", 4, 3).train()
    teacher = as_teacher(model, feature_kind="one-hot")
    assert (teacher.num_features, teacher.num_classes, teacher.accepts_edge_weight) == (4, 3, True)
    assert teacher.feature_kind == "one-hot" and len(teacher.batch_norms) == 4
    assert as_teacher(teacher) is teacher and as_teacher(teacher, 4, 3) is teacher
    graphs = hard_graphs()
    assert torch.equal(teacher(graphs), model(graphs.x, graphs.edges))
    model.train()
    # Someone put it back into training mode; a teacher answers in eval mode all the same.
    assert torch.equal(teacher(graphs), teacher(graphs)) and not model.training


class Failing(nn.Module):
    def __init__(self, answer):
        super().__init__()
        self.linear = nn.Linear(4, 2)
        self.answer = answer

    def forward(self, x, edge_index, batch):
        return self.answer(self.linear(x), batch)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda: 3, {}, "teacher: expected a torch.nn.Module or a Teacher, got 3"),
        (lambda: Failing(lambda h, batch: h), {}, r"expected logits \[2, classes\], got \(11, 2\)"),
        (lambda: Failing(lambda h, batch: (h[:2], h)), {}, r"expected logits \[2, classes\], got tuple"),
        (lambda: Failing(lambda h, batch: h[:2].flatten()), {}, r"expected logits \[2, classes\], got \(4,\)"),
        (
            lambda: Failing(lambda h, batch: h @ h),
            {},
            "expected Failing to run on two small graphs with 4 features, got RuntimeError: mat1",
        ),
        (ThreeArguments, {"num_features": 5}, "with 5 features, got InputError: x: expected"),
        (ThreeArguments, {"num_classes": 2}, r"num_classes: expected 3 \(the teacher's\), got 2"),
        (
            lambda: build_model("gcn2-4", 4, 2),
            {"num_features": 5},
            r"num_features: expected 4 \(the teacher's\), got 5",
        ),
        (lambda: build_model("gcn2-4", 4, 2), {"num_classes": 5}, r"num_classes: expected 2 \(the teacher's\), got 5"),
        (nn.Identity, {"call": lambda module, graphs: graphs.x}, "num_features: expected the width"),
    ],
)
def test_teachers_that_cannot_serve_are_named(make, options, message):
    with pytest.raises(InputError, match=message) as caught:
        as_teacher(make(), **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["blocks.0.conv.lin.weight", "blocks.1.norm.running_var"])
@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_tensors_that_are_not_finite_are_named(name, bad):
    model = build_model("gcn3-8", 4, 2)
    model.state_dict()[name].view(-1)[3] = bad
    with pytest.raises(InputError, match=f"got NaN or infinity in {name}"):
        as_teacher(model)


def test_graphs_that_do_not_fit_are_named():
    teacher = as_teacher(build_model("gcn3-8", 4, 2))
    with pytest.raises(InputError, match=r"graphs: expected node features of width 4 \(the teacher's\), got 6"):
        teacher(hard_graphs(width=6))
    with pytest.raises(InputError, match="graphs: expected a GraphBatch"):
        teacher(torch.zeros(3, 4))


def test_torch_geometric_models_are_teachers():
    """One with BatchNorm from PyG, GINConv (no weights) and global pooling, straight from its documentation."""
    pyg = pytest.importorskip("torch_geometric.nn")

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.gnn = pyg.GIN(in_channels=4, hidden_channels=8, num_layers=2, norm="batch_norm")
            self.head = pyg.MLP([8, 8, 3], norm=None)

        def forward(self, x, edge_index, edge_weight=None, batch=None):
            h = self.gnn(x, edge_index, edge_weight)
            return self.head(pyg.global_mean_pool(h, batch))

    graphs = hard_graphs()
    module = Net().eval()
    expected = module(graphs.x, graphs.to_edge_index()[0], None, graphs.batch())
    teacher = as_teacher(module)
    # It takes weights and PyG's GIN drops them without a word; what counts is that they change nothing.
    assert not teacher.accepts_edge_weight and (teacher.num_features, teacher.num_classes) == (4, 3)
    torch.testing.assert_close(teacher(graphs), expected)
    assert len(teacher.batch_norms) == sum(isinstance(m, nn.BatchNorm1d) for m in module.modules()) > 0


def test_call_convention_runs_modules_in_training():
    module = EdgeWeight().train()
    graphs = hard_graphs()
    call_convention(module)(graphs).sum().backward()
    assert module.training and all(p.grad is not None for p in module.parameters())


# Evaluation.


def test_evaluate_counts_right_answers():
    graphs = hard_graphs(sizes=(3, 2, 4, 1, 5), classes=3)
    model = build_model("gcn2-4", 4, 3).train()
    model.eval()
    logits = model(graphs.x, graphs.edges).detach()
    model.train()
    graphs.y[:] = logits.argmax(1)
    graphs.y[2] = (graphs.y[2] + 1) % 3
    for batch_size in (1, 2, 5, 99):
        scores = evaluate(model, graphs, batch_size=batch_size)
        assert scores["accuracy"] == pytest.approx(0.8) and scores["num_graphs"] == 5
        assert scores["majority"] == pytest.approx(int(graphs.y.bincount().max()) / 5)
        assert scores["loss"] == pytest.approx(float(nn.functional.cross_entropy(logits, graphs.y)), rel=1e-4)
    assert model.training
    assert evaluate(as_teacher(model), graphs)["accuracy"] == pytest.approx(0.8)
    assert isinstance(as_teacher(model), Teacher)
    assert evaluate(ThreeArguments(), graphs)["num_graphs"] == 5


def test_evaluate_names_labels_that_do_not_fit():
    model = build_model("gcn2-4", 4, 2)
    with pytest.raises(InputError, match="graphs: expected labels below 2, got 2"):
        evaluate(model, hard_graphs(classes=3))
    graphs = hard_graphs()
    with pytest.raises(InputError, match="at least one graph with labels"):
        evaluate(model, af.GraphBatch(graphs.x, graphs.edges))
    with pytest.raises(InputError, match="at least one graph with labels"):
        evaluate(model, graphs.select([]))
