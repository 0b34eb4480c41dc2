"""The linear layer of frozen networks against torch's own."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import OPCHECKED, kernels, normal, opcheck, reference_kernels  # noqa: F401
from hypothesis import given, settings
from hypothesis import strategies as st

import acgkd_fast as af
from acgkd_fast import InputError, _library, build_info
from acgkd_fast.linear import frozen_linear
from acgkd_fast.nn import linear as layers
from acgkd_fast.nn.linear import linear


@pytest.mark.parametrize("learns", [None, "weight", "bias"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(0, 3, 4), (1, 1, 1), (5, 2, 3), (70, 7, 64), (9, 16, 5), (9, 17, 5)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_same_values_and_gradients(shape, dtype, bias, learns):
    rows, before, after = shape
    x, weight = normal((rows, before), 1, dtype).requires_grad_(), normal((after, before), 2, dtype)
    shift = normal(after, 3, dtype) if bias else None
    for name, tensor in (("weight", weight), ("bias", shift)):
        if tensor is not None:
            tensor.requires_grad_(name == learns)
    found, wanted = linear(x, weight, shift), torch.nn.functional.linear(x, weight, shift)
    assert torch.equal(found, wanted)
    leaves = [t for t in (x, weight, shift) if t is not None and t.requires_grad]
    grad = normal((rows, after), 4, dtype)
    for a, b in zip(torch.autograd.grad(found, leaves, grad), torch.autograd.grad(wanted, leaves, grad), strict=True):
        assert a.is_contiguous()
        tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_second_derivatives():
    x, weight = normal((4, 3), 1).requires_grad_(), normal((2, 3), 2)
    assert torch.autograd.gradgradcheck(lambda x: linear(x, weight).pow(3), (x,))


def test_several_graphs_features():
    x, weight = normal((2, 4, 3), 1).requires_grad_(), normal((2, 3), 2)
    grad = normal((2, 4, 2), 3)
    (found,) = torch.autograd.grad(linear(x, weight), x, grad)
    torch.testing.assert_close(found, grad @ weight)


def case(rows: int, before: int, after: int, dtype: torch.dtype = torch.float32):
    return normal((rows, before), 1, dtype), normal((after, before), 2, dtype), normal(after, 3, dtype)


def assert_close(found: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    wide = torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    size = x.abs().double() @ weight.abs().double().t() + 1.0
    assert ((found.double() - wide).abs() <= 1e-6 * size).all()


# Blocks of 6 and of 60 rows.
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 4, 5, 6, 7, 59, 60, 61, 65, 120, 487])
@pytest.mark.parametrize("widths", [(16, 16), (64, 64), (16, 128), (128, 32), (96, 48)])
def test_frozen_linear_against_float64(kernels, rows, widths):  # noqa: F811
    x, weight, bias = case(rows, *widths)
    x.requires_grad_()
    for shift in (bias, None):
        out = frozen_linear(x, weight, shift)
        assert out.shape == (rows, widths[1]) and out.is_contiguous()
        assert_close(out, x.detach(), weight, shift)
        assert torch.equal(out, frozen_linear(x, weight, shift))
    grad = normal((rows, widths[1]), 4, torch.float32)
    (found,) = torch.autograd.grad(out, x, grad)
    assert_close(found, grad, weight.t(), None)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(0, 200),
    before=st.integers(1, 9).map(lambda n: 16 * n),
    after=st.integers(1, 9).map(lambda n: 16 * n),
    transposed=st.booleans(),
    shifted=st.booleans(),
)
def test_any_shape(kernels, rows, before, after, transposed, shifted):  # noqa: F811
    x, weight, bias = case(rows, before, after)
    given_weight = weight.t().contiguous() if transposed else weight
    found = torch.ops.acgkd_fast.frozen_linear(x, given_weight, bias if shifted else None, transposed)
    assert_close(found, x, weight, bias if shifted else None)


def test_infinities_and_nans_spread_as_in_torch(kernels):  # noqa: F811
    x, weight, bias = case(70, 16, 32)
    x[3, 2], x[61, 0], weight[5, 1] = math.inf, math.nan, -math.inf
    torch.testing.assert_close(
        frozen_linear(x, weight, bias),
        torch.nn.functional.linear(x, weight, bias),
        equal_nan=True,
        rtol=1e-5,
        atol=1e-5,
    )


def test_frozen_linear_opcheck(kernels):  # noqa: F811
    x, weight, bias = case(7, 16, 32)
    turned = weight.t().contiguous()
    opcheck(
        "frozen_linear",
        [
            (x.clone().requires_grad_(), weight, bias, False),
            (x, weight, None, False),
            (x, turned, bias, True),
            (x[:0].clone().requires_grad_(), turned, None, True),
        ],
    )


OPCHECKED |= {"frozen_linear"}


def test_gradcheck_of_the_formula():
    x, weight, bias = case(3, 16, 32, torch.float64)
    with reference_kernels():
        assert torch.autograd.gradcheck(lambda x: frozen_linear(x, weight, bias), (x.requires_grad_(),))


def test_what_learns_is_refused():
    x, weight, bias = case(5, 16, 16)
    with pytest.raises(InputError, match="weight: expected a tensor that does not require a gradient"):
        frozen_linear(x, weight.requires_grad_(), bias)
    with pytest.raises(InputError, match="weight: expected widths in multiples of 16, got "):
        frozen_linear(x[:, :5].contiguous(), weight.detach()[:, :5].contiguous(), bias)
    with pytest.raises(InputError, match="bias: expected a tensor that does not require a gradient"):
        frozen_linear(x, weight.detach(), bias.requires_grad_())


@pytest.mark.skipif(not build_info()["loaded"], reason="the native extension is not built")
def test_the_layer_takes_the_operator_where_it_pays(monkeypatch):
    calls = []
    monkeypatch.setattr(layers, "frozen_linear", lambda *a: calls.append(a) or frozen_linear(*a))
    assert _library.backend("frozen_linear", "cpu") == "native"
    x, weight, bias = case(512, 64, 64)
    torch.testing.assert_close(linear(x, weight, bias), torch.nn.functional.linear(x, weight, bias))
    assert len(calls) == 1
    for others in (
        (x[:511], weight, bias),
        (x, weight.clone().requires_grad_(), bias),
        (x, weight, bias.clone().requires_grad_()),
        (x.double(), weight.double(), bias.double()),
        (x[:, :63].contiguous(), weight[:, :63].contiguous(), bias),
        (x, weight[:63], bias[:63]),
        (x.t().contiguous().t(), weight, bias),
        (x, weight.t().contiguous().t(), bias),
        (x.view(2, 256, 64), weight, bias),
        (x, weight, bias.repeat_interleave(2)[::2]),
        (x, weight, bias[:1]),
    ):
        torch.testing.assert_close(linear(*others), torch.nn.functional.linear(*others))
    assert len(calls) == 1
    teacher = af.nn.GCNConv(64, 64).requires_grad_(False)
    teacher(x, torch.arange(512).repeat(2, 1))
    assert len(calls) == 2


@pytest.mark.parametrize("rows", [100, 600])
def test_transformed_calls_are_torchs(rows):
    x, weight, bias = case(rows, 16, 32)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight, bias).dtype == torch.bfloat16
    _, tangent = torch.func.jvp(lambda x: linear(x, weight, bias), (x,), (x,))
    torch.testing.assert_close(tangent, x @ weight.t())
    grad = torch.func.grad(lambda x: linear(x, weight, bias).sum())(x)
    torch.testing.assert_close(grad, weight.sum(0).expand(rows, 16))
    with torch.autograd.forward_ad.dual_level():
        dual = linear(torch.autograd.forward_ad.make_dual(x, x), weight, bias)
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(dual).tangent, x @ weight.t())


def test_frozen_layers_compile_as_one_graph_at_any_size():
    torch._dynamo.reset()
    layer = af.nn.GCNConv(32, 32).requires_grad_(False)
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(lambda x, w, b: linear(x, w, b), fullgraph=True, backend=counter, dynamic=True)
    for rows in (100, 200, 600, 2000):
        x = normal((rows, 32), 1, torch.float32).requires_grad_()
        torch.testing.assert_close(compiled(x, layer.lin.weight, layer.bias), linear(x, layer.lin.weight, layer.bias))
    assert counter.frame_count == 1
