"""Column statistics and the frozen BatchNorm against plain torch: values, gradients, bits, empty inputs."""

from __future__ import annotations

import pytest
import torch
from helpers import OPCHECKED, kernels, normal, opcheck  # noqa: F401
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from acgkd_fast.errors import InputError
from acgkd_fast.nn.norm import BatchNormReLU
from acgkd_fast.normalize import column_moments, frozen_norm_relu, mean_entropy, softmax_rows

# Rows on both sides of the kernel's blocks of 128, widths around vectors of 4, 8 and 16.
SHAPES = [(1, 1), (5, 3), (127, 16), (128, 17), (129, 8), (300, 64), (1000, 5)]
TOLERANCE = {
    torch.float64: {"rtol": 1e-12, "atol": 1e-12},
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2},
}
pytestmark = pytest.mark.usefixtures("kernels")


def statistics(width, dtype):
    mean, bias = normal(width, 1, dtype), normal(width, 2, dtype)
    variance, weight = normal(width, 3, dtype).square() + 0.1, normal(width, 4, dtype)
    return mean, variance, weight, bias


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
def test_column_moments_agree_with_torch(shape, dtype):
    x = (3.0 * normal(shape, 0) + 100.0).to(dtype).requires_grad_()
    oracle = x.detach().double().requires_grad_()
    weights = normal((2, shape[1]), 5)
    expected_var, expected_mean = torch.var_mean(oracle, dim=0, correction=0)
    mean, variance = column_moments(x)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert mean.dtype == variance.dtype == wide
    # An offset of 100 would cost a naive second moment four digits.
    torch.testing.assert_close(mean.double(), expected_mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(variance.double(), expected_var, rtol=1e-4, atol=1e-5)
    (weights[0] @ mean.double() + weights[1] @ variance.double()).backward()
    (weights[0] @ expected_mean + weights[1] @ expected_var).backward()
    scale = oracle.grad.abs().max()
    torch.testing.assert_close(x.grad.double() / scale, oracle.grad / scale, **TOLERANCE[dtype])


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
def test_frozen_norm_agrees_with_batch_norm(shape, dtype, residual):
    mean, variance, weight, bias = statistics(shape[1], dtype)
    x, added = normal(shape, 6, dtype).requires_grad_(), normal(shape, 7, dtype).requires_grad_()
    out = frozen_norm_relu(x, mean, variance, weight, bias, residual=added if residual else None)[0]
    oracle, oracle_added = (t.detach().double().requires_grad_() for t in (x, added))
    expected = torch.relu(
        nn.functional.batch_norm(oracle, mean.double(), variance.double(), weight.double(), bias.double())
    )
    expected = expected + oracle_added if residual else expected
    torch.testing.assert_close(out.double(), expected, **TOLERANCE[dtype])
    grad = normal(shape, 8)
    out.backward(grad.to(dtype))
    expected.backward(grad.to(dtype).double())
    # Where rounding carries a value across zero the rectifier decides otherwise; leave those out.
    clear = (expected - (oracle_added if residual else 0)).detach() > 0.05
    clear |= (expected - (oracle_added if residual else 0)).detach() == 0
    close = torch.isclose(x.grad.double(), oracle.grad, **TOLERANCE[dtype])
    assert (close | ~clear).double().mean() > 0.99
    if residual:
        assert torch.equal(added.grad, grad.to(dtype))


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(0, 140), width=st.integers(1, 20), seed=st.integers(0, 99))
def test_gradients_are_true_and_repeat_bit_by_bit(rows, width, seed):
    x = normal((rows, width), seed).requires_grad_()
    first, second = column_moments(x), column_moments(x)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.isfinite(a).all() for a in first)
    if 0 < rows * width <= 60:
        assert torch.autograd.gradcheck(column_moments, (x,))
        constants = statistics(width, torch.float64)
        residual = normal((rows, width), seed + 1).requires_grad_()
        fused = lambda a, b: frozen_norm_relu(a, *constants, residual=b, moments=True)  # noqa: E731
        assert torch.autograd.gradcheck(fused, (x, residual))
        out, *moments = fused(x, residual)
        assert torch.equal(out, frozen_norm_relu(x, *constants, residual=residual)[0])
        assert all(torch.equal(a, b) for a, b in zip(moments, first, strict=True))


def test_not_a_number_stays_one():
    x = torch.tensor([[float("nan"), 1.0]])
    one = torch.ones(2)
    assert torch.isnan(frozen_norm_relu(x, 0 * one, one, one, 0 * one)[0][0, 0])
    assert torch.isnan(column_moments(x)[0][0]) and not torch.isnan(column_moments(x)[0][1])


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_module_is_batch_norm_relu_and_residual(training, frozen):
    torch.manual_seed(0)
    ours, plain = BatchNormReLU(5), nn.BatchNorm1d(5)
    for layer in (ours, plain):
        with torch.no_grad():
            for name, tensor in layer.state_dict().items():
                if tensor.is_floating_point():
                    tensor.copy_(normal(5, len(name), torch.float32).abs() + 0.1)
        layer.train(training).requires_grad_(not frozen)
    x, residual = normal((7, 5), 1, torch.float32).requires_grad_(), normal((7, 5), 2, torch.float32)
    out, expected = ours(x, residual), torch.relu(plain(x)) + residual
    torch.testing.assert_close(out, expected)
    for a, b in zip(
        torch.autograd.grad(out.square().sum(), [x, *(p for p in ours.parameters() if p.requires_grad)]),
        torch.autograd.grad(expected.square().sum(), [x, *(p for p in plain.parameters() if p.requires_grad)]),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    for name, tensor in ours.state_dict().items():
        torch.testing.assert_close(tensor, plain.state_dict()[name])


# Rows on both sides of the kernel's chunks of 2048 values.
@pytest.mark.parametrize("shape", [(0, 3), (1, 1), (5, 7), (300, 7), (293, 14), (3, 2050), (129, 16)])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_softmax_and_entropy_agree_with_torch(shape, dtype):
    x = (4.0 * normal(shape, 0)).to(dtype).requires_grad_()
    oracle = x.detach().double().requires_grad_()
    soft, expected = softmax_rows(x), oracle.softmax(-1)
    assert soft.dtype == dtype
    torch.testing.assert_close(soft.double(), expected, **TOLERANCE[dtype])
    grad = normal(shape, 1, dtype)
    (found,), (wanted,) = torch.autograd.grad(soft, x, grad), torch.autograd.grad(expected, oracle, grad.double())
    torch.testing.assert_close(found.double(), wanted, **TOLERANCE[dtype])
    if shape[0] == 0:
        assert torch.isnan(mean_entropy(soft))
        return
    rows = soft.detach().requires_grad_()
    oracle = rows.detach().double().requires_grad_()
    entropy, expected = mean_entropy(rows), torch.special.entr(oracle).sum(-1).mean()
    torch.testing.assert_close(entropy.double(), expected, **TOLERANCE[dtype])
    entropy.backward()
    expected.backward()
    away = oracle.detach() > torch.finfo(dtype).tiny
    torch.testing.assert_close(rows.grad.double()[away], oracle.grad[away], **TOLERANCE[dtype])


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 6), width=st.integers(1, 9), seed=st.integers(0, 99))
def test_softmax_and_entropy_have_true_gradients(rows, width, seed):
    x = normal((rows, width), seed).requires_grad_()
    assert torch.autograd.gradcheck(softmax_rows, (x,))
    assert torch.autograd.gradcheck(lambda x: mean_entropy(softmax_rows(x)), (x,))
    assert torch.equal(mean_entropy(softmax_rows(x)), mean_entropy(softmax_rows(x)))


def test_entropy_of_saturated_rows_has_a_finite_gradient():
    x = torch.tensor([[0.0, 1e4], [-torch.inf, 0.0]], requires_grad=True)
    soft = softmax_rows(x)
    assert torch.equal(soft, torch.tensor([[0.0, 1.0], [0.0, 1.0]]))
    entropy = mean_entropy(soft)
    assert entropy == 0
    (grad,) = torch.autograd.grad(entropy, x)
    assert torch.equal(grad, torch.zeros(2, 2))
    assert torch.isnan(softmax_rows(torch.tensor([[torch.nan, 1.0]]))).all()
    assert torch.isnan(mean_entropy(torch.tensor([[torch.nan, 1.0]])))
    assert mean_entropy(torch.tensor([[-0.5, 1.0]])) == -torch.inf


def test_bad_input():
    x, one = torch.zeros(3, 2), torch.ones(2)
    with pytest.raises(InputError, match="x: expected a tensor of shape"):
        column_moments(torch.zeros(3))
    with pytest.raises(InputError, match="variance: expected a tensor of shape"):
        frozen_norm_relu(x, one, torch.ones(3), one, one)
    with pytest.raises(InputError, match="weight: expected a constant"):
        frozen_norm_relu(x, one, one, one.clone().requires_grad_(), one)
    with pytest.raises(InputError, match="residual"):
        frozen_norm_relu(x, one, one, one, one, residual=torch.zeros(2, 2))


def test_opcheck():
    constants = (*statistics(3, torch.float64), 1e-5)
    x, residual = normal((4, 3), 1).requires_grad_(), normal((4, 3), 2).requires_grad_()
    grad = normal((4, 3), 3)
    opcheck("column_moments", [(x,), (normal((0, 3), 1),)])
    opcheck("column_moments_backward", [(normal(3, 1), normal(3, 2), x.detach(), normal(3, 4))])
    opcheck("frozen_norm_relu", [(x, residual, *constants, moments) for moments in (True, False)])
    opcheck("frozen_norm_relu", [(x, None, *constants, True)])
    flat, mean = x.detach(), normal(3, 4)
    opcheck(
        "frozen_norm_relu_backward",
        [
            (grad, normal(3, 5), normal(3, 6), flat, mean, *constants),
            (grad, None, None, flat, mean[:0], *constants),
        ],
    )
    soft = torch.softmax(x.detach(), -1)
    opcheck("softmax_rows", [(x,), (x.detach()[:0],)])
    opcheck("softmax_rows_backward", [(grad, soft)])
    opcheck("mean_entropy", [(soft.clone().requires_grad_(),)])
    opcheck("mean_entropy_backward", [(normal((), 1), soft)])


OPCHECKED |= {"softmax_rows", "softmax_rows_backward", "mean_entropy", "mean_entropy_backward"}
OPCHECKED |= {"column_moments", "column_moments_backward", "frozen_norm_relu", "frozen_norm_relu_backward"}
