"""The linear maps inside the layers: initialisation and lazy width of PyTorch Geometric's, class of torch's."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from .._library import backend
from ..errors import InputError, check, is_integer
from ..linear import frozen_linear

# Widths for which MKL's product of a tall matrix and a narrow one takes up to three times as long as its transpose's.
_NARROW = range(2, 17)
# Beyond these a matrix leaves the first-level cache, and a general product blocks it better.
_WIDTHS = range(16, 129, 16)
_ROWS = 512


class Linear(nn.Linear):
    """torch.nn.Linear that can draw its weights by Glorot's rule."""

    def __init__(self, in_features: int, out_features: int, bias: bool, glorot: bool) -> None:
        self.glorot = glorot
        super().__init__(in_features, out_features, bias)

    def reset_parameters(self) -> None:
        _draw(self, self.glorot)


class LazyLinear(nn.LazyLinear):
    """A :class:`Linear` whose input width is that of the first tensor it sees."""

    cls_to_become = Linear  # type: ignore[assignment]

    def __init__(self, out_features: int, bias: bool, glorot: bool) -> None:
        self.glorot = glorot
        super().__init__(out_features, bias)

    def reset_parameters(self) -> None:
        if not self.has_uninitialized_params() and self.in_features > 0:
            _draw(self, self.glorot)


def _draw(layer: nn.Linear, glorot: bool) -> None:
    if glorot:
        nn.init.xavier_uniform_(layer.weight)
    else:
        nn.Linear.reset_parameters(layer)


def make_linear(in_channels: int, out_channels: int, *, bias: bool, glorot: bool = False) -> Linear | LazyLinear:
    """A linear map; `in_channels` -1 leaves the width to the first call.

    Raises:
        InputError: a width that is neither at least 1 nor -1.
    """
    check_width("in_channels", in_channels, lazy=True)
    check_width("out_channels", out_channels)
    if in_channels == -1:
        return LazyLinear(out_channels, bias, glorot)
    return Linear(in_channels, out_channels, bias, glorot)


def check_width(name: str, width: int, *, lazy: bool = False) -> None:
    fits = is_integer(width) and (width >= 1 or (lazy and width == -1))
    check(fits, name, "at least 1" + (" (or -1: set by the first call)" if lazy else ""), width)


def commutes(layer: nn.Module) -> bool:
    """Whether a map is x W^T (+ b) that nobody watches, so that it may change places with a sum over neighbours.

    The narrower side has fewer numbers to move along the edges, and a map that comes last adds its bias in
    the same pass. A hook wants to see what the map itself would have seen.
    """
    if isinstance(layer.weight, nn.parameter.UninitializedParameter) or type(layer).forward not in _PLAIN_FORWARDS:
        return False
    hooks = layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks
    return not any(hooks)


def widens(layer: nn.Module) -> bool:
    """Whether a linear map's output is at least as wide as its input."""
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    return weight.shape[0] >= weight.shape[1]


_PLAIN_FORWARDS = {nn.Linear.forward}


def know_linear(kind: type[nn.Module]) -> None:
    """Say that a class of another library computes x W^T + b from ``weight`` and ``bias``, and nothing else."""
    _PLAIN_FORWARDS.add(kind.forward)


def reset(module: Any) -> None:
    """Draw anew what can be: the module itself, else its children."""
    again = getattr(module, "reset_parameters", None)
    if callable(again):
        again()
    elif isinstance(module, nn.Module):
        for child in module.children():
            reset(child)


def first_width(module: nn.Module) -> int:
    """Input width of a module's first layer, by the names that linear layers give it.

    Raises:
        InputError: the first layer has none of these names.
    """
    first = module[0] if isinstance(module, nn.Sequential) else module
    for name in ("in_features", "in_channels"):
        width = getattr(first, name, None)
        if is_integer(width):
            assert isinstance(width, int)
            return width
    raise InputError(f"nn: expected a first layer with in_features or in_channels, got {type(first).__name__}")


@functools.cache
def _built() -> bool:
    """Asked once: the dispatcher takes 20 us to answer."""
    return backend("frozen_linear", "cpu") == "native"


def is_transformed(x: torch.Tensor) -> bool:
    """Whether the call is being compiled, traced, autocast or differentiated by torch.func or forward mode."""
    return (
        torch.compiler.is_compiling()
        or torch._C._is_tracing()
        or torch.is_autocast_enabled(x.device.type)
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
    )


def _pays(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether the operator takes these and pays for its call."""
    # First of all: shapes that are compared while compiling cost a compilation each.
    if is_transformed(x) or not (x.is_cpu and x.layout == torch.strided and x.dim() == 2 and len(x) >= _ROWS):
        return False
    given = [x, weight] if bias is None else [x, weight, bias]
    fits = all(t.is_contiguous() and t.dtype == torch.float32 for t in given)
    fits = fits and (bias is None or bias.shape == weight.shape[:1])
    return fits and weight.shape[0] in _WIDTHS and weight.shape[1] in _WIDTHS and _built()


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
    """``torch.nn.functional.linear``, faster on the CPU for an `x` of [N, F_in] where all else is constant.

    That is the case in a teacher's GCN and SAGE layers. Of the first, whose node labels are few, the gradient alone
    was 4 % of an inversion step; for the others general products take a fifth longer than
    :func:`~acgkd_fast.linear.frozen_linear`, which is for 512 rows and more, first derivatives and plain calls only.
    """
    learns = weight.requires_grad or (bias is not None and bias.requires_grad)
    if not learns and _pays(x, weight, bias):
        return frozen_linear(x, weight, bias)
    narrow = x.dim() == 2 and weight.shape[1] in _NARROW
    if x.requires_grad and not learns and x.is_cpu and narrow and not is_transformed(x):
        out: torch.Tensor = _NarrowLinear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
        return out
    return functional.linear(x, weight, bias)
