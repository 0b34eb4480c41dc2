"""Operator of frozen linear layers: schema, fake and gradient.

See ``edges/ops.py`` for how gradients are attached.
"""

from __future__ import annotations

from typing import Any

import torch

from .._library import define, differentiate
from ..errors import check
from . import reference

FROZEN_LINEAR = define(
    "frozen_linear(Tensor x, Tensor weight, Tensor? bias, bool transposed) -> Tensor",
    reference.frozen_linear,
    lambda x, weight, bias, transposed: x.new_empty(x.shape[0], weight.shape[1 if transposed else 0]),
)
# What the kernel takes at a time; the gradient needs it of the inputs too.
_COLUMNS = 16


def _setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.transposed = inputs[3]


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
    (weight,) = ctx.saved_tensors
    return torch.ops.acgkd_fast.frozen_linear(grad.contiguous(), weight, None, not ctx.transposed), None, None, None


differentiate(FROZEN_LINEAR, _backward, _setup)


def frozen_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x W^T + b with a W and b that do not learn.

    Args:
        x: float32 [N, F_in], contiguous.
        weight: float32 [F_out, F_in], both multiples of 16, contiguous.
        bias: float32 [F_out].

    Returns:
        [N, F_out].

    Gradients:
        `x`, once differentiable.

    Raises:
        InputError: a weight or bias that asks for a gradient, or a width that is no multiple of 16.
        RuntimeError: other forms or dtypes, from the native kernel.
    """
    for name, tensor in (("weight", weight), ("bias", bias)):
        frozen = tensor is None or not tensor.requires_grad
        check(frozen, name, "a tensor that does not require a gradient", tensor)
    widths = tuple(weight.shape)
    check(all(width % _COLUMNS == 0 for width in widths), "weight", f"widths in multiples of {_COLUMNS}", widths)
    out: torch.Tensor = torch.ops.acgkd_fast.frozen_linear(x, weight, bias, False)
    return out
