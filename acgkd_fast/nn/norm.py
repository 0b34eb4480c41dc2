"""BatchNorm together with the rectifier and the residual sum that follow it."""

from __future__ import annotations

import torch
from torch import nn

from ..normalize import frozen_norm_relu


class BatchNormReLU(nn.BatchNorm1d):
    """relu(BatchNorm(x)) (+ residual).

    A BatchNorm1d by state dict, hooks and training behaviour. In eval mode with frozen parameters,
    as in a teacher, all of it is one fused pass.
    """

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:  # type: ignore[override]
        """[N, C] -> [N, C]; gradients as the composition has them."""
        if self._is_frozen(x):
            assert self.running_mean is not None and self.running_var is not None
            return frozen_norm_relu(
                x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps, residual=residual
            )
        h = torch.relu(super().forward(x))
        return h if residual is None else h + residual

    def _is_frozen(self, x: torch.Tensor) -> bool:
        if self.training or self.running_mean is None or self.weight is None:
            return False
        learns = torch.is_grad_enabled() and (self.weight.requires_grad or self.bias.requires_grad)
        return not learns and x.dtype == self.running_mean.dtype
