"""Teachers of PyTorch Geometric's ready-made models: accelerated, with gradients for edges, and distilled."""

from __future__ import annotations

import functools
import re
import warnings
from pathlib import Path

import pytest
import torch
from helpers import normal, random_edges
from host_loops import StatisticsHook
from torch import nn

import acgkd_fast as af
from acgkd_fast.data import house_or_cycle, stratified_split
from acgkd_fast.graph_view import GraphView
from acgkd_fast.hosts.hooks import BatchNormHooks
from acgkd_fast.teachers import as_teacher, evaluate

pyg = pytest.importorskip("torch_geometric.nn")
from torch_geometric.nn.models import GAT, GCN, GIN, GraphSAGE  # noqa: E402

KINDS = {"GCN": GCN, "GIN": GIN, "GraphSAGE": GraphSAGE, "GAT": GAT}


class WithHead(nn.Module):
    """A model of theirs, pooling, and a linear head: what their tutorial makes of it."""

    def __init__(self, kind, features=4, width=8, classes=3):
        super().__init__()
        self.gnn = KINDS[kind](features, width, 2, norm="batch_norm")
        self.head = nn.Linear(width, classes)

    def forward(self, x, edge_index, batch):
        return self.head(pyg.global_add_pool(self.gnn(x, edge_index), batch))


class OnData(WithHead):
    def forward(self, data):
        return super().forward(data.x, data.edge_index, data.batch)


class AsksTheList(WithHead):
    def forward(self, x, edge_index, batch):
        assert edge_index.shape[0] == 2
        return super().forward(x, edge_index, batch)


def graphs():
    edges, _ = random_edges([5, 1, 7], symmetric=True, seed=0, dtype=torch.float32)
    edges = edges.with_value(torch.ones_like(edges.value).detach(), symmetric=True)
    return af.GraphBatch(normal((13, 4), 0, torch.float32), edges, torch.arange(3) % 2)


@pytest.mark.parametrize("form", [WithHead, OnData])
@pytest.mark.parametrize("kind", KINDS)
def test_accelerated_teachers_answer_the_same_and_have_edge_gradients(kind, form):
    torch.manual_seed(0)
    module, batch = form(kind), graphs()
    plain = as_teacher(module)
    expected = plain(batch)
    assert not plain.accepts_edge_weight
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        teacher = as_teacher(af.accelerate(module))
    assert (
        teacher.accepts_edge_weight and teacher.module is module and len(teacher.batch_norms) == 1 + (kind == "GIN") * 2
    )
    torch.testing.assert_close(teacher(batch), expected, rtol=1e-5, atol=1e-5)

    value = torch.full_like(batch.edges.value, 0.7).requires_grad_()
    soft = af.GraphBatch(batch.x, batch.edges.with_value(value))
    teacher(soft).square().sum().backward()
    assert value.grad.isfinite().all() and (value.grad != 0).any()
    # By differences: what a weight is to these layers is defined by us, so ask the numbers.
    with torch.no_grad():
        step = torch.zeros_like(value)
        step[3] = 1e-2
        ends = [
            teacher(af.GraphBatch(batch.x, batch.edges.with_value(value + s))).square().sum() for s in (step, -step)
        ]
    torch.testing.assert_close(value.grad[3], (ends[0] - ends[1]) / 2e-2, rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_learned_edges_get_a_gradient_through_teachers_we_did_not_write(kind):
    torch.manual_seed(0)
    teacher = as_teacher(af.accelerate(WithHead(kind)))
    layout = af.PairLayout.complete([5, 8])
    logits = normal(layout.num_pairs, 0, torch.float32).requires_grad_()
    edges = af.sample_edges(logits, layout, seed=0)
    logits_out = teacher(af.GraphBatch(normal((13, 4), 0, torch.float32), edges))
    nn.functional.cross_entropy(logits_out, torch.tensor([0, 1])).backward()
    drawn = torch.zeros(layout.num_pairs, dtype=torch.bool).index_fill(0, edges.pair, True)
    assert (logits.grad[drawn] != 0).any()
    # All but the softmax of GAT give absent candidates theirs too.
    assert bool((logits.grad[~drawn] != 0).any()) is (kind != "GAT")


def test_a_model_that_asks_the_edge_list_is_called_as_before():
    module, batch = AsksTheList("GIN"), graphs()
    expected = as_teacher(module)(batch)
    af.accelerate(module)
    with pytest.warns(RuntimeWarning, match="AsksTheList does not pass an EdgeSample on .*'EdgeSample' object has no"):
        teacher = as_teacher(module)
    assert not teacher.accepts_edge_weight
    torch.testing.assert_close(teacher(batch), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_statistics_of_accelerated_models(kind):
    """The hooks read what the hosts' own hooks read, with a gradient for the edges, and are gone afterwards."""
    torch.manual_seed(0)
    module, batch = af.accelerate(WithHead(kind)).eval(), graphs()
    norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm1d)]
    for norm in norms:
        nn.init.uniform_(norm.running_var, 0.5, 2.0)
    value = torch.full_like(batch.edges.value, 0.7).requires_grad_()
    soft = af.GraphBatch(batch.x, batch.edges.with_value(value))
    host = [StatisticsHook(m) for m in norms]
    with BatchNormHooks(module) as hooks:
        module(soft.x, soft.edges, soft.batch())
        found = torch.stack([hook.r_feature for hook in hooks])
        wanted = torch.stack([hook.r_feature for hook in host])
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
        grads = [torch.autograd.grad(r.sum(), value, retain_graph=True)[0] for r in (found, wanted)]
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-5)
    assert grads[0].any() and len(hooks) == len(norms) >= 1
    for hook in host:
        hook.close()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


def test_an_adapter_is_left_alone():
    module = af.accelerate(WithHead("GIN"))
    teacher = as_teacher(module, call=lambda module, graphs: module(graphs.x, graphs.edges, graphs.batch()))
    assert teacher.accepts_edge_weight and teacher.has_adapter


def readme_code(heading):
    """The first block of Python under a heading of the README."""
    text = (Path(__file__).parents[1] / "README.md").read_text()
    found = re.search(rf"^## {heading}\n.*?```python\n(.*?)```", text, re.DOTALL | re.MULTILINE)
    assert found is not None
    return found[1]


def with_degrees(graphs):
    """One-hot degrees 0 to 6 as node labels."""
    degree = graphs.edges.rowptr.diff().long().clamp(max=6)
    return af.GraphBatch(nn.functional.one_hot(degree, 7).float(), graphs.edges, graphs.y)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_readmes_ten_lines_on_models_we_did_not_write(kind, accelerated, monkeypatch):
    """Teach one of theirs, drop the data, run the README's own text with less to do, and measure the student."""
    torch.manual_seed(0)
    data = house_or_cycle(24)
    seen, held_out = (with_degrees(data.graphs.select(part)) for part in stratified_split(data.graphs.y, seed=0))
    model = WithHead(kind, features=7, width=6, classes=2)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(seen.x, seen.to_edge_index()[0], seen.batch()), seen.y).backward()
        optimizer.step()

    code = readme_code("On your own model, in ten lines")
    assert len(code.splitlines()) <= 10 and "num_graphs=400" in code
    short = code.replace("num_graphs=400", "num_graphs=12")
    monkeypatch.setattr(af, "refine", functools.partial(af.refine, steps=5))
    monkeypatch.setattr(
        af, "distill_student", functools.partial(af.distill_student, settings=af.StudentSettings(epochs=2))
    )
    names = {"model": af.accelerate(model) if accelerated else model}
    exec(short, names)
    teacher, pool, student = names["teacher"], names["pool"], names["student"]
    scores = evaluate(student, held_out)
    assert scores["num_graphs"] == held_out.num_graphs and 0 <= scores["accuracy"] <= 1
    assert pool.num_graphs == 12 and teacher(pool).shape == (12, 2) and teacher.accepts_edge_weight is accelerated
    assert student(pool.x, pool.to_edge_index()[0], batch=pool.batch()).shape == (12, 2)
    assert names["start"].num_graphs == 12 and model is teacher.module


def test_the_readmes_pieces():
    layout = af.PairLayout.complete([12, 30, 7])
    logits = normal(layout.num_pairs, 0, torch.float32).requires_grad_()
    x = normal((49, 5), 1, torch.float32).requires_grad_()
    names = {"af": af, "x": x, "logits": logits}
    exec(readme_code("The pieces"), names)
    assert names["out"].shape == (3, 5)
    grads = torch.autograd.grad(names["out"].square().sum(), [x, logits])
    assert all((grad != 0).any() for grad in grads)


# The view that stands in for a DGL graph.


def test_graph_view_tells_what_dgl_would():
    batch = graphs()
    view = GraphView(batch)
    source, target = view.edges()
    assert view.num_nodes() == view.number_of_nodes() == 13 and view.num_edges() == view.number_of_edges() == len(
        source
    )
    assert view.batch_num_nodes().tolist() == [5, 1, 7] and int(view.batch_num_edges().sum()) == len(source)
    assert view.in_degrees().tolist() == torch.bincount(target, minlength=13).tolist()
    assert view.out_degrees().tolist() == torch.bincount(source, minlength=13).tolist()
    assert view.batch_size == 3 and view.device == batch.x.device and view.to("cpu").num_nodes() == 13
    with view.local_scope():
        view.ndata["h"] = batch.x
        view.local_var().edata["e"] = source
    assert set(view.ndata) == {"attr"} and set(view.edata) == {"weight"}
    with pytest.raises(
        AttributeError, match=r"expected DGL to be installed, as the teacher uses its graph\.update_all"
    ):
        view.update_all(None, None)
    assert not hasattr(view, "ntypes")
