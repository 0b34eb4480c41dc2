"""Column statistics and frozen BatchNorm in plain torch: the oracle of the fused kernels."""

from __future__ import annotations

import torch

from ..edges.reference import compute_dtype


def column_moments(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and biased variance over the rows, [C] each; zeros without rows."""
    wide = x.to(compute_dtype(x.dtype))
    if x.shape[0] == 0:
        return wide.new_zeros(x.shape[1]), wide.new_zeros(x.shape[1])
    variance, mean = torch.var_mean(wide, dim=0, correction=0)
    return mean, variance


def column_moments_backward(
    grad_mean: torch.Tensor, grad_variance: torch.Tensor, x: torch.Tensor, mean: torch.Tensor
) -> torch.Tensor:
    """(grad_mean + 2 (x - mean) grad_variance) / rows, [N, C]."""
    rows = max(x.shape[0], 1)
    grad = (grad_mean + 2.0 * (x.to(mean.dtype) - mean) * grad_variance) / rows
    return grad.to(x.dtype)


def _normalised(
    x: torch.Tensor,
    mean: torch.Tensor,
    variance: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    wide = compute_dtype(x.dtype)
    scale = weight.to(wide) * (variance.to(wide) + eps).rsqrt()
    return (x.to(wide) - mean.to(wide)) * scale + bias.to(wide), scale


def frozen_norm_relu(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    mean: torch.Tensor,
    variance: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    moments: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """relu((x - mean) / sqrt(variance + eps) * weight + bias) (+ residual), [N, C], and the moments of x.

    The moments are those of :func:`column_moments`, or empty tensors if `moments` is False.
    """
    out = torch.relu(_normalised(x, mean, variance, weight, bias, eps)[0])
    if residual is not None:
        out = out + residual.to(out.dtype)
    found = column_moments(x) if moments else (out.new_empty(0), out.new_empty(0))
    return out.to(x.dtype), *found


def frozen_norm_relu_backward(
    grad_out: torch.Tensor,
    grad_mean: torch.Tensor | None,
    grad_variance: torch.Tensor | None,
    x: torch.Tensor,
    batch_mean: torch.Tensor,
    mean: torch.Tensor,
    variance: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
) -> torch.Tensor:
    """Gradient of x, [N, C]: grad_out times the scale where the rectifier passes, plus that of the moments."""
    value, scale = _normalised(x, mean, variance, weight, bias, eps)
    grad = torch.where(value <= 0, 0.0, grad_out.to(scale.dtype) * scale)
    if grad_mean is not None and grad_variance is not None:
        grad = grad + column_moments_backward(grad_mean, grad_variance, x.to(scale.dtype), batch_mean)
    return grad.to(x.dtype)


def softmax_rows(x: torch.Tensor) -> torch.Tensor:
    """exp(x_ik) / sum_k exp(x_ik)."""
    return x.softmax(-1)


def softmax_rows_backward(grad_out: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    wide = compute_dtype(out.dtype)
    grad, y = grad_out.to(wide), out.to(wide)
    return (y * (grad - (grad * y).sum(-1, keepdim=True))).to(out.dtype)


def mean_entropy(x: torch.Tensor) -> torch.Tensor:
    """Mean over rows of -sum_k x_ik log x_ik."""
    return torch.special.entr(x.to(compute_dtype(x.dtype))).sum(-1).mean()


def mean_entropy_backward(grad_mean: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """-(log x + 1) / N, with log of the smallest normal number at 0, so that a softmax behind it gets 0 and not NaN."""
    wide = x.to(compute_dtype(x.dtype))
    logs = wide.clamp(min=torch.finfo(wide.dtype).tiny).log()
    return (-grad_mean / max(1, len(x)) * (logs + 1.0)).to(x.dtype)
