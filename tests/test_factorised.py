"""Factorised logits against the same logits materialised: the same draws, the same gradients."""

from __future__ import annotations

import pytest
import torch
from helpers import kernels, normal  # noqa: F401
from hypothesis import given, settings
from hypothesis import strategies as st

import acgkd_fast as af
from acgkd_fast.edges import FactorLogits, factorised

pytestmark = pytest.mark.usefixtures("kernels")

ESTIMATORS = ("straight_through", "sparse_straight_through")


def draw_both(sizes, width, *, seed, shared_bias=False, dtype=torch.float64, **options):
    """Samples from the factors and from the dense logits, and the gradients of z and the bias of both."""
    layout = af.PairLayout.complete(sizes, graph_ids=[7 * g + 3 for g in range(len(sizes))])
    results = []
    for factors in (True, False):
        z = normal((layout.num_nodes, width), seed, dtype).requires_grad_()
        bias = normal(1 if shared_bias else len(sizes), seed + 1, dtype).requires_grad_()
        logits = FactorLogits(z, bias)
        sample = af.sample_edges(logits if factors else logits.to_dense(layout), layout, seed=seed, **options)
        # Through `value` alone: a port would reach absent candidates, which factors do not promise.
        sample.value.backward(normal(sample.value.shape, seed + 2, dtype))
        results.append((sample, z.grad, bias.grad))
    return results


def assert_same(results, tolerance=1e-10):
    (ours, *gradients), (dense, *expected) = results
    for name in ("rowptr", "col", "pair", "value", "ptr"):
        assert torch.equal(getattr(ours, name), getattr(dense, name)), name
    assert ours.symmetric and ours.port is None
    for actual, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=tolerance, atol=tolerance)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(1, 9), max_size=4),
    st.integers(0, 5),
    st.sampled_from(ESTIMATORS),
    st.sampled_from(["logistic", "gumbel"]),
    st.floats(0.1, 3.0),
    st.integers(0, 10**6),
)
def test_ragged_shapes(sizes, width, estimator, noise, temperature, seed):
    options = {"estimator": estimator, "noise": noise, "temperature": temperature, "step": seed, "absent_rate": 0.5}
    assert_same(draw_both(sizes, width, seed=seed, **options))


@pytest.mark.parametrize("block", [1, 7, 64])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_blocks_of_any_length(monkeypatch, estimator, block):
    """Graphs that span several blocks of the plain-torch kernel; native kernels block as they like."""
    monkeypatch.setattr(factorised, "BLOCK_PAIRS", block)
    assert_same(draw_both([30, 1, 17], 4, seed=3, estimator=estimator))


@pytest.mark.parametrize("spare", [0, 9])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_capacity_and_one_bias_for_all(estimator, spare):
    (sample, *_), _ = draw_both([12, 5], 3, seed=4, shared_bias=True, estimator=estimator)
    options = {"estimator": estimator, "capacity": sample.num_edges + spare}
    assert_same(draw_both([12, 5], 3, seed=4, shared_bias=True, **options))
    small = {"estimator": estimator, "capacity": sample.num_edges - 1}
    (overflowing, z_grad, bias_grad), _ = draw_both([12, 5], 3, seed=4, shared_bias=True, **small)
    assert overflowing.overflowed() and overflowing.num_edges == 0
    assert not z_grad.any() and not bias_grad.any()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_float32(estimator):
    assert_same(draw_both([40, 25], 8, seed=5, dtype=torch.float32, estimator=estimator), tolerance=1e-4)


LAYOUT = af.PairLayout.complete([4, 3])
Z, BIAS = torch.zeros(7, 2), torch.zeros(2)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: FactorLogits(torch.zeros(7), BIAS), r"z: expected a tensor of shape \(any, any\)"),
        (lambda: FactorLogits(Z.half(), BIAS.half()), r"z: expected dtype float32 or float64 or bfloat16"),
        (lambda: FactorLogits(Z, BIAS.double()), r"bias: expected dtype float32"),
        (lambda: FactorLogits(Z, torch.zeros(2, 1)), r"bias: expected one number per graph, or one for all"),
        (lambda: af.sample_edges(FactorLogits(Z, torch.zeros(3)), LAYOUT, seed=0), r"bias: expected 1 or 2 numbers"),
        (
            lambda: af.sample_edges(FactorLogits(Z[:6], BIAS), LAYOUT, seed=0),
            r"z: expected a tensor of shape \(7, any\)",
        ),
        (
            lambda: af.sample_edges(FactorLogits(Z, BIAS), LAYOUT, seed=0, estimator="relaxed"),
            r"estimator: expected one of straight_through, sparse_straight_through",
        ),
        (
            lambda: af.sample_edges(FactorLogits(Z, BIAS), af.PairLayout.budget([4, 3], 0.5), seed=0),
            r"layout: expected a complete undirected PairLayout",
        ),
    ],
)
def test_bad_arguments_are_named(call, text):
    with pytest.raises(af.InputError, match=f"^{text}"):
        call()
