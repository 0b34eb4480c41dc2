"""Time against nodes, pairs, edges, width and batch, one at a time, and the growth that is to be expected.

Each axis is five sizes of one problem. The expected exponent is of the time in the amount once fixed costs no longer
count, so it is compared with the growth between the last sizes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bench_propagate_gpu import DENSITIES, TOLERANCE, Problem, Size
from conftest import Contest
from edges_peers import Problem as DrawProblem
from edges_peers import eager_to_csr
from edges_peers import ours as draw
from propagate_peers import gather_scatter
from propagate_peers import ours as propagate
from step_peers import C_BN, C_OH, Shape, make_teacher, pyg_drawn_edges

from acgkd_fast.distill.inversion import Learner, LearnSettings
from acgkd_fast.layout import PairLayout
from acgkd_fast.pseudo_graphs import PseudoGraphs

CPU = torch.device("cpu")
DEGREE = 4.0
# Amounts, and the power of the amount that time should follow.
AXES: dict[str, tuple[tuple[int, ...], float]] = {
    "nodes": ((100, 200, 400, 800, 1600), 2.0),
    "nodes, budget": ((100, 200, 400, 800, 1600), 1.0),
    "pairs": ((100, 250, 600, 1400, 3000), 1.0),
    "edges": ((2, 8, 24, 64, 160), 1.0),
    "width": ((16, 32, 64, 128, 256), 1.0),
    "batch": ((8, 32, 128, 512), 1.0),
}
POINTS = [(axis, size) for axis, (sizes, _) in AXES.items() for size in sizes]
Ways = dict[str, Callable[[], object]]


def step(graphs: int, nodes: int, xi: float) -> tuple[Ways, int]:
    """A learning step on graphs of one size, about four partners per node."""
    shape = Shape("scaling", graphs, (nodes, nodes), DEGREE / (nodes - 1))
    layout = PairLayout.complete([nodes] * graphs) if xi == 1.0 else PairLayout.budget([nodes] * graphs, xi)
    share = torch.tensor(DEGREE * layout.num_nodes / (2 * layout.num_pairs))
    generator = torch.Generator().manual_seed(1)
    logits = share.logit() + 0.5 * torch.randn(layout.num_pairs, generator=generator)
    features = torch.randn(layout.num_nodes, shape.num_features, generator=generator)
    pseudo = PseudoGraphs(logits, features, torch.arange(graphs) % 2, layout, feature_kind="one-hot")
    settings = LearnSettings(steps=10_000, c_bn=C_BN, c_oh=C_OH, c_degree=0.0, lr_structure=1e-3)
    ours = Learner(make_teacher(shape), pseudo, settings)
    ways: Ways = {"ours": ours.advance}
    if xi == 1.0:
        # The same losses and networks as in bench_step.py, which compares their results before it times them.
        ways["PyG on drawn edges"] = pyg_drawn_edges(shape)
    return ways, layout.num_pairs


def message_passing(nodes: int, degree: float, width: int) -> tuple[Ways, dict[str, float]]:
    density = degree / (nodes - 1)
    DENSITIES[f"{density}"] = (density, 0.0)
    problem = Problem(Size(nodes, 1, width, f"{density}"), CPU, torch.float32)
    layers = {"ours": propagate, "gather and scatter": gather_scatter}
    for label, layer in layers.items():
        assert problem.error(layer) <= TOLERANCE[torch.float32], label
    ways: Ways = {label: functools.partial(problem.step, layer) for label, layer in layers.items()}
    return ways, {"edges": problem.edges.col.numel(), "moved": sum(problem.bytes_moved().values())}


def drawing(nodes: int) -> tuple[Ways, int]:
    problem = DrawProblem.make(1, nodes, DEGREE / (nodes - 1), CPU, dense=False)
    # One seed gives one sample, whose length is known after the first draw.
    capacity = int(draw(problem, "sparse_straight_through", 0).needed)
    entries = torch.ones(capacity)

    def ours() -> torch.Tensor:
        value = draw(problem, "sparse_straight_through", capacity).value
        return torch.autograd.grad(value, problem.logits, entries)[0]

    def peer() -> torch.Tensor:
        value = eager_to_csr(problem)
        return torch.autograd.grad(value, problem.logits, torch.ones_like(value))[0]

    return {"ours": ours, "eager torch to CSR": peer}, problem.layout.num_pairs


@pytest.mark.parametrize(("axis", "size"), POINTS, ids=lambda value: str(value))
def test_growth(axis: str, size: int, contest: Contest) -> None:
    info: dict[str, Any] = {}
    if axis.startswith("nodes"):
        ways, info["pairs"] = step(1, size, 1.0 if axis == "nodes" else min(1.0, 32 / size))
        amount, what = size, "learning step, one graph"
    elif axis == "batch":
        ways, info["pairs"] = step(size, 18, 1.0)
        amount, what = size, "learning step, graphs of 18 nodes"
    elif axis == "pairs":
        ways, amount = drawing(size)
        what = "draw and gradient, one graph, about 4 partners"
    else:
        ways, found = message_passing(4000, size if axis == "edges" else 16, size if axis == "width" else 64)
        info |= found
        amount, what = (int(found["edges"]) if axis == "edges" else size), "GCN layer and gradient, 4000 nodes"
    contest(ways, least=3, axis=axis, amount=amount, expected=AXES[axis][1], operator=what, **info)
