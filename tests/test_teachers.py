"""Teachers of every make behind one call, training that resumes exactly, evaluation."""

from __future__ import annotations

import math
import os

import pytest
import torch
from helpers import normal, random_edges
from real_data import data_root  # noqa: F401
from torch import nn

import acgkd_fast as af
from acgkd_fast import training
from acgkd_fast.data import gfkd_split, house_or_cycle, load_dataset
from acgkd_fast.errors import DataError, InputError
from acgkd_fast.nn import GCNConv, build_model
from acgkd_fast.teachers import Teacher, as_teacher, call_convention, default_epochs, evaluate, train_classifier


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


class Unknown(Base):
    def forward(self, graph, features):
        return self.answer(features, graph, torch.zeros(len(features)).long())


class Adjacency(nn.Module):
    """Dense: (x [B, n, F], adjacency [B, n, n], mask)."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x, adjacency, mask):
        return (self.linear(x + adjacency @ x) * mask[:, :, None]).sum(1)


FORMS = [
    (ThreeArguments, False),
    (EdgeWeight, True),
    (EdgeAttr, True),
    (IgnoresWeights, False),
    (PyGData, False),
    (PyGDataWithWeights, True),
    (TakesEdges, True),
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
        InputError, match=r"got forward\(x, adjacency, mask\) of Adjacency; give an adapter such as call="
    ):
        as_teacher(module)
    teacher = as_teacher(module, call=lambda module, graphs: module(*graphs.to_dense()))
    assert (teacher.num_features, teacher.num_classes, teacher.accepts_edge_weight) == (4, 3, True)
    torch.testing.assert_close(teacher(graphs), module(*graphs.to_dense()))
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


# Training.


def parity_graphs(count=40, seed=0):
    """Graphs whose feature sum tells the class: learnt in a few steps."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(count) % 2
    sizes = torch.randint(3, 8, (count,), generator=generator)
    ptr = torch.nn.functional.pad(sizes.cumsum(0), (1, 0))
    x = torch.rand(int(ptr[-1]), 3, generator=generator)
    x[:, 0] += y.repeat_interleave(sizes)
    ring = torch.arange(int(ptr[-1]))
    following = torch.where(torch.isin(ring + 1, ptr), ring, ring + 1)
    edge_index = torch.stack([torch.cat([ring, following]), torch.cat([following, ring])])
    edge_index = edge_index[:, edge_index[0] != edge_index[1]]
    return af.GraphBatch(x, af.EdgeSample.from_edge_index(edge_index, ptr), y)


def weights(model):
    return torch.cat([tensor.flatten().double() for tensor in model.state_dict().values()])


@pytest.mark.parametrize("arch", ["gcn3-16", "gin3-16"])
def test_training_learns_and_repeats_itself(arch):
    graphs = parity_graphs()
    losses = []
    state = torch.random.get_rng_state()
    model = train_classifier(
        arch, graphs, epochs=30, seed=1, progress=lambda epoch, v: losses.append((epoch, v["loss"]))
    )
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [epoch for epoch, _ in losses] == list(range(1, 31))
    scores = evaluate(model, graphs)
    assert scores["accuracy"] == 1.0 and scores["loss"] < 0.2 and not model.training
    torch.manual_seed(99)
    assert torch.equal(weights(train_classifier(arch, graphs, epochs=30, seed=1)), weights(model))
    assert not torch.equal(weights(train_classifier(arch, graphs, epochs=30, seed=2)), weights(model))


class Stop(Exception):
    pass


@pytest.mark.parametrize("stop_at", [1, 13, 20, 25])
def test_an_interrupted_training_ends_with_the_same_weights(tmp_path, stop_at):
    graphs, path = parity_graphs(), tmp_path / "state"
    whole = train_classifier("gin3-8", graphs, epochs=25, seed=3, weight_decay=1e-3)

    def stop(epoch, _):
        if epoch == stop_at:
            raise Stop

    with pytest.raises(Stop):
        train_classifier("gin3-8", graphs, epochs=25, seed=3, weight_decay=1e-3, progress=stop, checkpoint=path)
    epochs = []
    resumed = train_classifier(
        "gin3-8", graphs, epochs=25, seed=3, weight_decay=1e-3, progress=lambda e, _: epochs.append(e), checkpoint=path
    )
    # A state is written after every tenth epoch, when its progress has been told.
    assert epochs[0] == 10 * ((stop_at - 1) // 10) + 1
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name


def test_a_checkpoint_of_another_training_is_refused(tmp_path):
    graphs, path = parity_graphs(), tmp_path / "state"
    settings = {"epochs": 20, "seed": 3, "lr": 0.01}
    train_classifier("gcn3-8", graphs, **settings, checkpoint=path)
    cases = {
        "epochs 30, got 20": ("gcn3-8", graphs, settings | {"epochs": 30}),
        "seed 4, got 3": ("gcn3-8", graphs, settings | {"seed": 4}),
        "lr 0.02, got 0.01": ("gcn3-8", graphs, settings | {"lr": 0.02}),
        "arch gin3-8, got gcn3-8": ("gin3-8", graphs, settings),
        "graphs .*, got": ("gcn3-8", parity_graphs(seed=1), settings),
    }
    for message, (arch, data, options) in cases.items():
        with pytest.raises(DataError, match=message):
            train_classifier(arch, data, **options, checkpoint=path)
    path.write_text("damaged")
    with pytest.raises(DataError, match="does not read"):
        train_classifier("gcn3-8", graphs, **settings, checkpoint=path)
    assert os.listdir(tmp_path) == ["state"]


def single_nodes(count):
    edges = af.EdgeSample.from_edge_index(torch.empty(2, 0, dtype=torch.int64), torch.arange(count + 1))
    return af.GraphBatch(torch.rand(count, 2), edges, torch.arange(count) % 2)


@pytest.mark.parametrize(("count", "batch_size"), [(2, 1), (5, 1), (5, 2), (5, 4), (33, 32)])
def test_a_batch_of_one_node_joins_its_neighbour(count, batch_size):
    """BatchNorm refuses one row; every graph still takes part in every epoch."""
    model = train_classifier("gcn2-4", single_nodes(count), epochs=2, batch_size=batch_size)
    assert weights(model).isfinite().all()
    for sizes in (torch.ones(count, dtype=torch.int64), (torch.arange(count) + 1) % 3):
        batches = training.shuffled_batches(sizes, batch_size, 0, 1)
        assert sorted(torch.cat(batches).tolist()) == list(range(count))
        assert all(int(sizes[batch].sum()) >= 2 for batch in batches)


def test_mini_batches_are_shuffled_anew_every_epoch():
    sizes = torch.full((10,), 4)
    first, second = (training.shuffled_batches(sizes, 4, 7, epoch) for epoch in (0, 1))
    assert [len(batch) for batch in first] == [4, 4, 2]
    assert torch.cat(first).tolist() != torch.cat(second).tolist()
    assert torch.equal(torch.cat(first), torch.cat(training.shuffled_batches(sizes, 4, 7, 0)))


@pytest.mark.parametrize(
    ("graphs", "options", "message"),
    [
        (af.GraphBatch(torch.zeros(13, 4), hard_graphs().edges), {}, "expected at least one graph with labels"),
        (hard_graphs(classes=3), {"num_classes": 2}, "graphs: expected labels below 2, got 2"),
        (hard_graphs(width=5), {"model": build_model("gcn2-4", 4, 2)}, "graphs: expected features of width 4"),
        (hard_graphs(), {"epochs": -1}, "epochs"),
        (hard_graphs(), {"lr": 0.0}, "lr"),
        (hard_graphs(), {"batch_size": 0}, "batch_size"),
        (hard_graphs(), {"seed": -1}, "seed"),
        (hard_graphs(), {"model": "resnet"}, "arch"),
        (single_nodes(1), {}, "at least 2 nodes in all, got 1"),
    ],
)
def test_trainings_that_cannot_be_are_named(graphs, options, message):
    model = options.pop("model", "gcn2-4")
    with pytest.raises(InputError, match=message):
        train_classifier(model, graphs, **{"epochs": 1} | options)


def test_progress_bar(capsys):
    pytest.importorskip("tqdm")
    train_classifier("gcn2-4", parity_graphs(8), epochs=3, progress=True)
    assert "3/3" in capsys.readouterr().err


def test_default_epochs_are_about_1500_steps():
    assert [default_epochs(n) for n in (10, 131, 420, 5000)] == [300, 300, 114, 30]


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


# The teachers of the studies, with default settings.


@pytest.mark.slow
def test_house_or_cycle_teacher_knows_the_structure():
    pytest.importorskip("torch_geometric")
    graphs = house_or_cycle().graphs
    train, test = gfkd_split(600)
    model = train_classifier("gcn5-64", graphs.select(train))
    assert evaluate(model, graphs.select(test))["accuracy"] >= 0.97


@pytest.mark.slow
def test_mutag_teacher_beats_the_majority(data_root, tmp_path):  # noqa: F811
    pytest.importorskip("torch_geometric")
    graphs = load_dataset("MUTAG", data_root, cache_dir=tmp_path).graphs
    train, test = gfkd_split(188)
    model = train_classifier("gcn5-64", graphs.select(train))
    scores = evaluate(model, graphs.select(test))
    assert scores["num_graphs"] == 57 and scores["accuracy"] > scores["majority"] + 0.05
