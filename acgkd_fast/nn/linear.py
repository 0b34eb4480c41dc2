"""The linear layer of a frozen network on few input features."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

# Widths for which MKL's product of a tall matrix and a narrow one takes up to three times as long as its transpose's.
_NARROW = range(2, 17)


class _NarrowLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(weight)
        return functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return (weight.t() @ grads[0].t()).t().contiguous(), None, None


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``torch.nn.functional.linear`` of [N, F_in], with a faster gradient of `x` where all else is constant.

    That is the first layer of a teacher, whose node labels are few: on the CPU this gradient alone was 4 % of an
    inversion step.
    """
    learns = weight.requires_grad or (bias is not None and bias.requires_grad)
    if x.requires_grad and not learns and x.is_cpu and weight.shape[1] in _NARROW:
        out: torch.Tensor = _NarrowLinear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
        return out
    return functional.linear(x, weight, bias)
