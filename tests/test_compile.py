"""torch.compile of users' models that contain our operators: one graph, eager's values and gradients, other sizes."""

from __future__ import annotations

import shutil

import pytest
import torch
from helpers import make_layout, normal, random_edges
from torch._dynamo.testing import CompileCounterWithBackend

import acgkd_fast as af
from acgkd_fast.nn import GCNConv, GINConv
from acgkd_fast.nn.models import build_model
from acgkd_fast.normalize import column_moments, frozen_norm_relu

WIDTH = 6
ESTIMATORS = ("relaxed", "hard_concrete", "straight_through", "sparse_straight_through", "arm")
# Inductor writes C++, which takes it many seconds per model.
INDUCTOR = [pytest.mark.slow, pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs g++")]


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class UserModel(torch.nn.Module):
    """What a user writes around our layers, as it trains: parameters, BatchNorm, dropout left out."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        mlp = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU())
        self.first, self.second = GCNConv(WIDTH, 8), GINConv(mlp, train_eps=True)
        self.norm = torch.nn.BatchNorm1d(8)

    def forward(self, x, edges):
        h = torch.tanh(self.norm(self.first(x, edges)))
        return af.readout(self.second(h, edges), edges.ptr, "mean")


def frozen(arch):
    torch.manual_seed(0)
    return build_model(arch, WIDTH, 2).eval().requires_grad_(False)


def normalised(x, edges):
    shift, ones = torch.zeros(WIDTH), torch.ones(WIDTH)
    out, mean, variance = frozen_norm_relu(x, shift, ones, ones, shift, residual=x, moments=True)
    first, second = column_moments(out)
    return torch.stack([mean, variance, first, second])


GIVEN_EDGES = {
    "gcn_propagate": lambda x, edges: af.gcn_propagate(x, edges),
    "gcn_propagate, no self-loops": lambda x, edges: af.gcn_propagate(x, edges, add_self_loops=False),
    "gin_propagate": lambda x, edges: af.gin_propagate(x, edges, 0.5),
    "gat_propagate": lambda x, edges: af.gat_propagate(x, x[:, :2], x[:, 2:4], edges),
    "readout sum": lambda x, edges: af.readout(x, edges.ptr),
    "readout max": lambda x, edges: af.readout(x, edges.ptr, "max"),
    "frozen norm": normalised,
    "frozen gcn": frozen("gcn3-8"),
    "frozen gin": frozen("gin3-8"),
    "user's model": UserModel(),
}


def gradients(out, leaves):
    weight = torch.linspace(0.5, 1.5, out.numel(), dtype=out.dtype).view(out.shape)
    return torch.autograd.grad((out * weight).sum(), leaves, allow_unused=True)


def check_equal(compiled, eager, leaves):
    torch.testing.assert_close(compiled, eager)
    for got, want in zip(gradients(compiled, leaves), gradients(eager, leaves), strict=True):
        assert (got is None) == (want is None)
        if want is not None:
            torch.testing.assert_close(got, want)


def given(sizes, symmetric, seed):
    edges, _ = random_edges(list(sizes), symmetric=symmetric, seed=seed, dtype=torch.float32)
    edges.value = edges.value.detach().requires_grad_()
    x = normal((edges.num_nodes, WIDTH), seed, torch.float32).requires_grad_()
    # Known from now on; GCN layers ask once per sample, which would break the graph.
    assert not edges.has_self_loops()
    return x, edges, [x, edges.value]


@pytest.mark.parametrize(
    ("name", "symmetric", "backend"),
    [
        *[(name, True, "aot_eager") for name in GIVEN_EDGES],
        *[(name, False, "aot_eager") for name in ("gcn_propagate", "gin_propagate", "gat_propagate")],
        *[pytest.param(name, True, "inductor", marks=INDUCTOR) for name in ("frozen gcn", "user's model")],
    ],
)
def test_one_graph_for_every_size(name, symmetric, backend):
    function = GIVEN_EDGES[name]
    leaves = list(function.parameters()) if isinstance(function, torch.nn.Module) else []
    leaves = [p for p in leaves if p.requires_grad]
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(function, backend=counter, fullgraph=True)
    # The first size is compiled as it is, the second makes it general, the third must find that good enough.
    for sizes, most in (((5, 8, 3), 1), ((9, 4, 13), 2), ((20, 2, 7), 2)):
        x, edges, inputs = given(sizes, symmetric, seed=sum(sizes))
        check_equal(compiled(x, edges), function(x, edges), [*inputs, *leaves])
        assert counter.frame_count <= most, (sizes, counter.frame_count)


def drawn(layout, logits, x, estimator, capacity, model):
    edges = af.sample_edges(logits, layout, seed=3, step=2, temperature=0.7, estimator=estimator, capacity=capacity)
    return model(x, edges)


@pytest.mark.parametrize(
    ("estimator", "kind", "capacity", "backend"),
    [
        *[(estimator, "complete", None, "aot_eager") for estimator in ESTIMATORS],
        *[(estimator, "budget-directed", 400, "aot_eager") for estimator in ESTIMATORS],
        pytest.param("straight_through", "complete", None, "inductor", marks=INDUCTOR),
    ],
)
def test_drawing_and_teacher_in_one_graph(estimator, kind, capacity, backend):
    """From logits to the teacher's answer; the sample lives inside the compiled function."""
    model = frozen("gcn3-8")
    compiled = torch.compile(drawn, backend=backend, fullgraph=True)
    for sizes in ((6, 9, 4), (12, 3, 8)):
        layout = make_layout(kind, list(sizes))
        logits = normal(layout.num_pairs, 1, torch.float32).requires_grad_()
        x = normal((layout.num_nodes, WIDTH), 2, torch.float32).requires_grad_()
        arguments = (layout, logits, x, estimator, capacity, model)
        check_equal(compiled(*arguments), drawn(*arguments), [logits, x])


def test_seed_step_and_temperature_as_tensors_compile_once():
    """What changes from step to step may be a tensor, and then no step compiles anew."""
    layout, model = make_layout("complete", [6, 9, 4]), frozen("gin3-8")
    x = normal((layout.num_nodes, WIDTH), 2, torch.float32)

    def loss(logits, seed, step, temperature):
        edges = af.sample_edges(
            logits, layout, seed=seed, step=step, temperature=temperature, estimator="relaxed", capacity=400
        )
        return model(x, edges)

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, backend=counter, fullgraph=True)
    logits = normal(layout.num_pairs, 1, torch.float32).requires_grad_()
    for step in range(4):
        arguments = (torch.tensor(5), torch.tensor(step), torch.tensor([0.5 + step], dtype=torch.float64))
        check_equal(compiled(logits, *arguments), loss(logits, *arguments), [logits])
    assert counter.frame_count == 1


def test_a_sample_leaves_a_compiled_function_and_enters_another():
    layout, model = make_layout("complete", [6, 9, 4]), frozen("gcn3-8")
    logits = normal(layout.num_pairs, 1, torch.float32).requires_grad_()
    x = normal((layout.num_nodes, WIDTH), 2, torch.float32).requires_grad_()

    @torch.compile(backend="aot_eager", fullgraph=True)
    def draw(logits):
        return af.sample_edges(logits, layout, seed=1, estimator="straight_through")

    edges = draw(logits)
    assert isinstance(edges, af.EdgeSample)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)(x, edges)
    eager = model(x, af.sample_edges(logits, layout, seed=1, estimator="straight_through"))
    check_equal(compiled, eager, [logits, x])


def test_explain_counts_no_break():
    x, edges, _ = given((5, 8, 3), True, seed=1)
    for function in GIVEN_EDGES.values():
        found = torch._dynamo.explain(function)(x, edges)
        assert (found.graph_count, found.graph_break_count) == (1, 0), found


def test_an_edge_list_breaks_the_graph_and_still_gives_the_same_answer():
    """Sorting a list into CSR checks its values on the host: do it once, outside. Fails when that is no longer true."""
    x, edges, _ = given((5, 8, 3), True, seed=1)
    edge_index, weight = edges.to_edge_index()
    layer = GCNConv(WIDTH, 8)
    torch.testing.assert_close(torch.compile(layer, backend="aot_eager")(x, edge_index, weight), layer(x, edges))
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.TorchDynamoException):
        torch.compile(layer, backend="aot_eager", fullgraph=True)(x, edge_index, weight)
