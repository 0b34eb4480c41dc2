"""The product in plain torch, which every kernel is tested against."""

from __future__ import annotations

import torch


def frozen_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, transposed: bool) -> torch.Tensor:
    """x W^T + b, or x W + b where `transposed`."""
    return torch.nn.functional.linear(x, weight.t() if transposed else weight, bias)
