"""The linear layer of frozen networks against torch's own."""

from __future__ import annotations

import pytest
import torch
from helpers import normal

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
