"""BatchNorm together with the rectifier and the residual sum that follow it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from ..normalize import column_moments, frozen_norm_relu


class BatchNormReLU(nn.BatchNorm1d):
    """relu(BatchNorm(x)) (+ residual).

    A BatchNorm1d by state dict, hooks and training behaviour. In eval mode with frozen parameters,
    as in a teacher, all of it is one fused pass.

    Attributes:
        observer: called with the mean and variance of every input, [C] each with their gradients,
            which the fused pass takes along; None switches that off.
    """

    observer: Callable[[torch.Tensor, torch.Tensor], None] | None = None

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """[N, C] -> [N, C]; gradients as the composition has them."""
        if not self._is_frozen(x):
            if self.observer is not None:
                self.observer(*column_moments(x))
            h = torch.relu(super().forward(x))
            return h if residual is None else h + residual
        assert self.running_mean is not None and self.running_var is not None
        out, *moments = frozen_norm_relu(
            x,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            eps=self.eps,
            residual=residual,
            moments=self.observer is not None,
        )
        if self.observer is not None:
            self.observer(*moments)
        return out

    def _is_frozen(self, x: torch.Tensor) -> bool:
        if self.training or self.running_mean is None or self.weight is None:
            return False
        learns = torch.is_grad_enabled() and (self.weight.requires_grad or self.bias.requires_grad)
        return not learns and x.dtype == self.running_mean.dtype
