"""Operators of column statistics and frozen BatchNorm: schemas, fakes and gradients.

See ``edges/ops.py`` for how gradients are attached.
"""

from __future__ import annotations

from typing import Any

import torch

from .._library import define, differentiate
from ..edges.reference import compute_dtype
from . import reference

_STATISTICS = "Tensor mean, Tensor variance, Tensor weight, Tensor bias, float eps"


def _moments_fake(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    wide = compute_dtype(x.dtype)
    return x.new_empty(x.shape[1], dtype=wide), x.new_empty(x.shape[1], dtype=wide)


COLUMN_MOMENTS = define("column_moments(Tensor x) -> (Tensor, Tensor)", reference.column_moments, _moments_fake)
COLUMN_MOMENTS_BACKWARD = define(
    "column_moments_backward(Tensor grad_mean, Tensor grad_variance, Tensor x, Tensor mean) -> Tensor",
    reference.column_moments_backward,
    lambda grad_mean, grad_variance, x, mean: torch.empty_like(x),
)


def _frozen_fake(x: torch.Tensor, *args: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    found = x.new_empty(x.shape[1] if args[-1] else 0, dtype=compute_dtype(x.dtype))
    return torch.empty_like(x), found, torch.empty_like(found)


FROZEN_NORM_RELU = define(
    f"frozen_norm_relu(Tensor x, Tensor? residual, {_STATISTICS}, bool moments) -> (Tensor, Tensor, Tensor)",
    reference.frozen_norm_relu,
    _frozen_fake,
)
FROZEN_NORM_RELU_BACKWARD = define(
    "frozen_norm_relu_backward(Tensor grad_out, Tensor? grad_mean, Tensor? grad_variance, Tensor x,"
    f" Tensor batch_mean, {_STATISTICS}) -> Tensor",
    reference.frozen_norm_relu_backward,
    lambda grad_out, grad_mean, grad_variance, x, *_: torch.empty_like(x),
)


SOFTMAX_ROWS = define("softmax_rows(Tensor x) -> Tensor", reference.softmax_rows, torch.empty_like)
SOFTMAX_ROWS_BACKWARD = define(
    "softmax_rows_backward(Tensor grad_out, Tensor out) -> Tensor",
    reference.softmax_rows_backward,
    lambda grad_out, out: torch.empty_like(out),
)
MEAN_ENTROPY = define(
    "mean_entropy(Tensor x) -> Tensor",
    reference.mean_entropy,
    lambda x: x.new_empty((), dtype=compute_dtype(x.dtype)),
)
MEAN_ENTROPY_BACKWARD = define(
    "mean_entropy_backward(Tensor grad_mean, Tensor x) -> Tensor",
    reference.mean_entropy_backward,
    lambda grad_mean, x: torch.empty_like(x),
)


def _moments_setup(ctx: Any, inputs: tuple[torch.Tensor], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    ctx.save_for_backward(inputs[0], output[0])


def _zeros_for(grad: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(like) if grad is None else grad.contiguous()


def _moments_backward(ctx: Any, grad_mean: torch.Tensor | None, grad_variance: torch.Tensor | None) -> torch.Tensor:
    x, mean = ctx.saved_tensors
    grad: torch.Tensor = torch.ops.acgkd_fast.column_moments_backward(
        _zeros_for(grad_mean, mean), _zeros_for(grad_variance, mean), x, mean
    )
    return grad


def _frozen_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    x, residual, *statistics, eps, _moments = inputs
    ctx.save_for_backward(x, output[1], *statistics)
    ctx.eps = eps
    ctx.has_residual = residual is not None


def _frozen_backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    grad_out, grad_mean, grad_variance = grads
    x, mean, *statistics = ctx.saved_tensors
    if grad_mean is not None or grad_variance is not None:
        grad_mean, grad_variance = _zeros_for(grad_mean, mean), _zeros_for(grad_variance, mean)
    grad_out = _zeros_for(grad_out, x)
    grad_x = torch.ops.acgkd_fast.frozen_norm_relu_backward(
        grad_out, grad_mean, grad_variance, x, mean, *statistics, ctx.eps
    )
    return grad_x, grad_out if ctx.has_residual else None, None, None, None, None, None, None


differentiate(COLUMN_MOMENTS, _moments_backward, _moments_setup)
differentiate(FROZEN_NORM_RELU, _frozen_backward, _frozen_setup)


def _softmax_setup(ctx: Any, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
    ctx.save_for_backward(output)


def _softmax_backward(ctx: Any, grad_out: torch.Tensor) -> torch.Tensor:
    grad: torch.Tensor = torch.ops.acgkd_fast.softmax_rows_backward(grad_out.contiguous(), *ctx.saved_tensors)
    return grad


def _entropy_setup(ctx: Any, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
    ctx.save_for_backward(inputs[0])


def _entropy_backward(ctx: Any, grad_mean: torch.Tensor) -> torch.Tensor:
    grad: torch.Tensor = torch.ops.acgkd_fast.mean_entropy_backward(grad_mean, *ctx.saved_tensors)
    return grad


differentiate(SOFTMAX_ROWS, _softmax_backward, _softmax_setup)
differentiate(MEAN_ENTROPY, _entropy_backward, _entropy_setup)
