"""What torch.library and torch.compile ask of every operator, and which kernel runs it."""

from __future__ import annotations

import importlib
import math
import pkgutil
from pathlib import Path

import pytest
import torch
from helpers import (  # noqa: F401
    KERNELS,
    LAYOUT_KINDS,
    OPCHECKED,
    kernels,
    make_layout,
    normal,
    opcheck,
    reference_kernels,
)

import acgkd_fast as af
from acgkd_fast import _library
from acgkd_fast.edges.estimators import Estimator, Noise

WIDTH = 3
SETTINGS = (-0.1, 1.1, 0.25)
MAX = 2


def layout_arguments(layout, dtype=torch.float64):
    logits = normal(layout.num_pairs, 1, dtype)
    rng, temperature = torch.tensor([3, 4]), torch.tensor([0.7], dtype=torch.float64)
    return logits, layout.table, rng, temperature, layout.kind


def edge_cases():
    for kind, sizes in [*((kind, [1, 4, 3]) for kind in LAYOUT_KINDS), ("complete", [1, 1])]:
        layout = make_layout(kind, sizes)
        logits, *rest = layout_arguments(layout)
        leaf = logits.clone().requires_grad_()
        for estimator in Estimator if kind == "complete" else [Estimator.SPARSE_STRAIGHT_THROUGH]:
            settings = (int(estimator), int(Noise.LOGISTIC), *SETTINGS)
            capacities = (-1, 40, 2) if estimator == Estimator.RELAXED else (-1,)
            for capacity in capacities:
                yield "sample_edges", (leaf, *rest, *settings, layout.num_nodes, capacity)
            value, rowptr, col, pair, _ = torch.ops.acgkd_fast.sample_edges(
                logits, *rest, *settings, layout.num_nodes, 40
            )
            yield "sample_edges_backward", (value, rowptr, col, pair, logits, *rest, *settings)
            yield "sample_edges_backward_sparse", (value, rowptr, col, pair, logits, *rest, *settings)
        for noise in Noise:
            yield "candidate_port", (leaf, *rest, int(noise))
            yield "candidate_port_backward", (normal(layout.num_pairs, 2), logits, *rest, int(noise))
        left, right = normal((layout.num_nodes, WIDTH), 3), normal((layout.num_nodes, WIDTH), 4)
        node_term = normal(layout.num_nodes, 5)
        yield "candidate_gradient", (left, right, node_term, layout.table, layout.kind, layout.num_pairs)
        yield "candidate_backward", (left, right, node_term, logits, *rest, int(Noise.GUMBEL))
        yield "pair_uniforms", (layout.table, rest[1], layout.kind, 1, layout.num_pairs)


def factor_cases():
    for sizes in ([1, 4, 3], [1, 1]):
        layout = make_layout("complete", sizes)
        _, table, rng, temperature, _ = layout_arguments(layout)
        z, bias = normal((layout.num_nodes, WIDTH), 1), normal(len(sizes), 2)
        estimator = int(Estimator.SPARSE_STRAIGHT_THROUGH)
        settings = (table, rng, temperature, estimator, int(Noise.LOGISTIC), 0.25)
        leaves = (z.clone().requires_grad_(), bias.clone().requires_grad_())
        for capacity in (-1, 40):
            yield "sample_factor_edges", (*leaves, *settings, layout.num_pairs, capacity)
        arguments = (z, bias, *settings, layout.num_pairs, 40)
        value, rowptr, col, pair, _ = torch.ops.acgkd_fast.sample_factor_edges(*arguments)
        yield "sample_factor_edges_backward", (value, rowptr, col, pair, z, bias, *settings)


def propagate_cases():
    for kind, sizes, estimator in [
        ("complete", [1, 4, 3], "straight_through"),
        ("complete-directed", [1, 4, 3], "straight_through"),
        ("budget", [1, 1], "relaxed"),
    ]:
        layout = make_layout(kind, sizes)
        logits = layout_arguments(layout)[0].requires_grad_()
        edges = af.sample_edges(logits, layout, seed=1, estimator=estimator)
        port = None if edges.port is None else edges.port.detach().requires_grad_()
        value = edges.value.detach().requires_grad_()
        matrix = (edges.rowptr, edges.col, *edges.transposed())
        table = None if port is None else layout.table
        x = normal((layout.num_nodes, WIDTH), 2).requires_grad_()
        eps = torch.tensor([0.2], dtype=torch.float64, requires_grad=True)
        grad_out = normal(x.shape, 3)
        flat_x, flat_value = x.detach(), value.detach()
        for loops in (True, False):
            arguments = (x, value, port, table, *matrix, loops, layout.kind)
            yield "gcn_propagate", arguments
            out, scale = torch.ops.acgkd_fast.gcn_propagate(*arguments)
            backward = (grad_out, flat_x, out.detach(), flat_value, scale, *matrix, loops)
            yield "gcn_propagate_backward", backward
        yield "gin_propagate", (x, value, eps, port, table, *matrix, layout.kind)
        yield "gin_propagate_backward", (grad_out, flat_x, flat_value, eps.detach(), *matrix)
        ptr = torch.tensor([0, 1, 1, layout.num_nodes])
        for mode in (0, 1, MAX):
            yield "readout", (x, ptr, mode)
            _, argmax = torch.ops.acgkd_fast.readout(flat_x, ptr, mode)
            yield "readout_backward", (normal((3, WIDTH), 4), argmax, ptr, mode, layout.num_nodes)


CASES = [*edge_cases(), *factor_cases(), *propagate_cases()]
OPCHECKED |= {name for name, _ in CASES}


def test_every_operator_has_a_case():
    """Every module that declares operators, and every test module that adds its own to OPCHECKED."""
    for module in pkgutil.walk_packages(af.__path__, "acgkd_fast."):
        if module.name.endswith(".ops"):
            importlib.import_module(module.name)
    for path in Path(__file__).parent.glob("test_*.py"):
        if "OPCHECKED" in path.read_text():
            importlib.import_module(path.stem)
    assert set(_library.operators()) <= OPCHECKED


@pytest.mark.parametrize("name", sorted({name for name, _ in CASES}))
def test_which_kernel_runs(name, record_property):
    """The dispatcher's own answer, and that the override used by the other tests reaches the oracle.

    Stands before the tests that use the `kernels` fixture, whose override lives as long as its module.
    """
    arguments = next(arguments for case, arguments in CASES if case == name)
    operator = getattr(torch.ops.acgkd_fast, name)
    backend = _library.backend(name, "cpu")
    record_property("backend", backend)
    assert backend in ("native", "reference") and (backend == "native") <= ("native" in KERNELS)
    with reference_kernels() as ran:
        operator(*arguments)
    assert name in ran
    ran.clear()
    operator(*arguments)
    assert not ran and _library.backend(name, "cpu") == backend


@pytest.mark.parametrize("name", sorted({name for name, _ in CASES}))
def test_opcheck(kernels, name):  # noqa: F811
    opcheck(name, [arguments for case, arguments in CASES if case == name])


def model(logits, x, eps, layout, estimator, capacity):
    edges = af.sample_edges(logits, layout, seed=5, step=2, estimator=estimator, capacity=capacity)
    hidden = torch.relu(af.gcn_propagate(x, edges))
    out = af.gin_propagate(hidden, edges, eps)
    return torch.cat([af.readout(out, layout.node_ptr, mode) for mode in ("sum", "mean", "max")], dim=1)


COMPILED = [
    *((kind, "straight_through") for kind in LAYOUT_KINDS),
    *(("complete", estimator) for estimator in ("relaxed", "hard_concrete", "sparse_straight_through")),
]


@pytest.mark.parametrize(("kind", "estimator"), COMPILED)
def test_compiles_as_one_graph_with_gradients(kernels, kind, estimator):  # noqa: F811
    layout = make_layout(kind, [1, 5, 4])
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    results = []
    for run in (model, compiled):
        logits = normal(layout.num_pairs, 1).requires_grad_()
        x, eps = normal((10, WIDTH), 2).requires_grad_(), torch.zeros(1, dtype=torch.float64, requires_grad=True)
        out = run(logits, x, eps, layout, estimator, 2 * layout.num_pairs)
        results.append([out, *torch.autograd.grad((out * normal(out.shape, 3)).sum(), [logits, x, eps])])
    for eager, traced in zip(*results, strict=True):
        torch.testing.assert_close(traced, eager, rtol=1e-12, atol=1e-14)
        assert math.isfinite(traced.abs().sum().item()) and traced.any()
