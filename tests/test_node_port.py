"""The port that takes node factors, which CUDA tensors use, against the one that takes a gradient per candidate."""

from __future__ import annotations

import pytest
import torch
from helpers import LAYOUT_KINDS, OPCHECKED, kernels, make_layout, normal, opcheck  # noqa: F401

import acgkd_fast as af
from acgkd_fast.propagate import api

pytestmark = [
    pytest.mark.usefixtures("kernels"),
    pytest.mark.filterwarnings("ignore:acgkd_fast runs plain torch:RuntimeWarning"),
]
OPCHECKED |= {"node_port"}


def gradients(kind: str, capacity: int | None, dtype: torch.dtype) -> list[torch.Tensor]:
    """Two layers of different width and kind, so that two ports meet in one leaf."""
    layout = make_layout(kind, [1, 6, 4])
    logits, x = normal(layout.num_pairs, 1, dtype).requires_grad_(), normal((11, 3), 2, dtype).requires_grad_()
    weight = normal((3, 5), 3, dtype)
    edges = af.sample_edges(logits, layout, seed=4, temperature=0.8, noise="gumbel", capacity=capacity)
    hidden = torch.tanh(af.gcn_propagate(x, edges)) @ weight
    out = af.gin_propagate(hidden, edges, 0.3)
    return list(torch.autograd.grad((out * normal(out.shape, 5, dtype)).sum(), (logits, x)))


@pytest.mark.parametrize("capacity", [None, 60])
@pytest.mark.parametrize("kind", LAYOUT_KINDS)
def test_same_gradients_through_either_port(kind, capacity, monkeypatch):
    expected = gradients(kind, capacity, torch.float64)
    ran = []

    def fuses(x: torch.Tensor) -> bool:
        ran.append(x.shape)
        return True

    monkeypatch.setattr(api, "_fuses_candidates", fuses)
    for ours, theirs in zip(gradients(kind, capacity, torch.float64), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
    assert ran == [(11, 3), (11, 5)] and expected[0].count_nonzero() > 0.9 * expected[0].numel()


def test_features_of_another_precision(kernels, monkeypatch):  # noqa: F811
    if kernels == "native":
        pytest.skip("the CPU kernel wants one precision; CUDA tensors take this port, whose kernel does not")
    monkeypatch.setattr(api, "_fuses_candidates", lambda _: True)
    layout = af.PairLayout.complete([7])
    logits = normal(21, 1, torch.float32).requires_grad_()
    for dtype in (torch.bfloat16, torch.float64):
        edges = af.sample_edges(logits, layout, seed=4)
        af.gin_propagate(normal((7, 3), 2, dtype), edges).sum().backward()
    assert logits.grad.dtype == torch.float32 and logits.grad.isfinite().all()


def test_node_port_is_stored_once_and_dropped_with_the_port():
    layout = af.PairLayout.complete([5])
    edges = af.sample_edges(normal(10, 1).requires_grad_(), layout, seed=4)
    port = torch.ops.acgkd_fast.node_port(*edges.draw, torch.ones(5, 3))
    assert port.shape == (1, 35) and port.untyped_storage().nbytes() == 4 and not port.any()
    assert edges.with_value(edges.value).draw is None


def test_opcheck():
    layout = make_layout("budget", [1, 4, 3])
    logits = normal(layout.num_pairs, 1).requires_grad_()
    rng, temperature = torch.tensor([3, 4]), torch.tensor([0.7], dtype=torch.float64)
    opcheck("node_port", [(logits, layout.table, rng, temperature, layout.kind, 0, normal((8, 3), 2))])
