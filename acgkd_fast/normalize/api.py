"""Public column statistics and frozen BatchNorm: checks, then one operator call."""

from __future__ import annotations

import torch

from ..errors import InputError, check_tensor
from . import ops

_DTYPES = (torch.float32, torch.float64, torch.bfloat16)

assert ops.COLUMN_MOMENTS  # importing the module declares the operators


def column_moments(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and biased variance of every column in one pass each way.

    Args:
        x: [N, C]; float32, float64 or bfloat16.

    Returns:
        (mean, variance), [C] each; float64 for float64, else float32. Equal input gives equal bits.

    Gradients:
        `x`.

    Raises:
        InputError: not a matrix of these dtypes.
    """
    check_tensor("x", x, shape=(None, None), dtypes=_DTYPES)
    mean, variance = torch.ops.acgkd_fast.column_moments(x.contiguous())
    return mean, variance


def frozen_norm_relu(
    x: torch.Tensor,
    mean: torch.Tensor,
    variance: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    *,
    eps: float = 1e-5,
    residual: torch.Tensor | None = None,
    moments: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """relu((x - mean) / sqrt(variance + eps) * weight + bias) + residual, in one pass each way.

    Args:
        x: [N, C]; float32, float64 or bfloat16 (arithmetic in float32).
        mean, variance, weight, bias: [C], dtype of `x`; constants.
        eps: added to the variance.
        residual: [N, C], dtype of `x`; added behind the rectifier.
        moments: also take the moments of `x`, as :func:`column_moments` does.

    Returns:
        (out [N, C] with the dtype of `x`, mean [C], variance [C]); the last two are empty without `moments`.

    Gradients:
        `x`, through the moments too, and `residual`; none for the statistics and the affine parameters.

    Raises:
        InputError: tensors of the wrong form, or a statistic or parameter that requires grad.
    """
    check_tensor("x", x, shape=(None, None), dtypes=_DTYPES)
    for name, tensor in (("mean", mean), ("variance", variance), ("weight", weight), ("bias", bias)):
        check_tensor(name, tensor, shape=(x.shape[1],), dtypes=(x.dtype,), device=x.device)
        if tensor.requires_grad and torch.is_grad_enabled():
            raise InputError(f"{name}: expected a constant, got a tensor that requires grad")
    if residual is not None:
        check_tensor("residual", residual, shape=tuple(x.shape), dtypes=(x.dtype,), device=x.device)
        residual = residual.contiguous()
    statistics = (mean.contiguous(), variance.contiguous(), weight.contiguous(), bias.contiguous())
    out, *found = torch.ops.acgkd_fast.frozen_norm_relu(x.contiguous(), residual, *statistics, eps, moments)
    return out, *found


def softmax_rows(x: torch.Tensor) -> torch.Tensor:
    """softmax(x) over the last of two dimensions, made for many short rows such as soft node labels.

    Args:
        x: [N, C]; float32, float64 or bfloat16.

    Returns:
        [N, C], dtype of `x`. Equal input gives equal bits.

    Gradients:
        `x`.

    Raises:
        InputError: not a matrix of these dtypes.
    """
    check_tensor("x", x, shape=(None, None), dtypes=_DTYPES)
    # torch's own kernel is as good elsewhere.
    if not x.is_cpu:
        return x.softmax(-1)
    out: torch.Tensor = torch.ops.acgkd_fast.softmax_rows(x.contiguous())
    return out


def mean_entropy(x: torch.Tensor) -> torch.Tensor:
    """Mean over rows of -sum_k x_k log x_k, in nats.

    Args:
        x: [N, C], entries 0 or more; float32, float64 or bfloat16.

    Returns:
        Scalar; float64 for float64, else float32. Equal input gives equal bits.

    Gradients:
        `x`; finite at 0, so that saturated soft labels do not turn into NaN.

    Raises:
        InputError: not a matrix of these dtypes.
    """
    check_tensor("x", x, shape=(None, None), dtypes=_DTYPES)
    if not x.is_cpu:
        return torch.special.entr(x.clamp(min=torch.finfo(x.dtype).tiny)).sum(-1).mean()
    mean: torch.Tensor = torch.ops.acgkd_fast.mean_entropy(x.contiguous())
    return mean
