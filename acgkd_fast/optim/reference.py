"""Adam's step in plain torch: the oracle of the fused one. The signature is that of the operator."""

from __future__ import annotations

import torch

from ..edges.reference import compute_dtype


def adam_step(
    param: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    index: torch.Tensor | None,
    grad: torch.Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    step: int,
) -> None:
    """m = b1 m + (1 - b1) g, v = b2 v + (1 - b2) g^2, p -= lr / (1 - b1^t) m / (sqrt(v / (1 - b2^t)) + eps), in place.

    With `index` ascending the gradient is `grad` there and 0 elsewhere; moments decay and values move everywhere.
    """
    if index is not None:
        grad = torch.zeros_like(param).view(-1).index_copy_(0, index, grad).view_as(param)
    wide = compute_dtype(param.dtype)
    g = grad.to(wide)
    mean = beta1 * exp_avg.to(wide) + (1.0 - beta1) * g
    square = beta2 * exp_avg_sq.to(wide) + (1.0 - beta2) * g * g
    denominator = square.sqrt() / (1.0 - beta2**step) ** 0.5 + eps
    param.copy_(param.to(wide) - lr / (1.0 - beta1**step) * mean / denominator)
    exp_avg.copy_(mean)
    exp_avg_sq.copy_(square)
