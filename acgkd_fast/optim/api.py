"""Adam for logits of which few get a gradient in each step."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from ..errors import InputError, check, is_number
from . import ops

_DTYPES = (torch.float32, torch.float64, torch.bfloat16)

assert ops.ADAM_STEP  # importing the module declares the operator


class Adam(torch.optim.Adam):
    """Adam that takes sparse gradients at their word: zero wherever they hold nothing.

    The same numbers, up to rounding, and the same ``state_dict`` as ``torch.optim.Adam``, which refuses sparse
    gradients (``torch.optim.SparseAdam`` takes them, but lets untouched moments stand still, which is another method).
    A step is one pass over values and moments in one kernel and no float is spent on the zeros. On devices other than
    the CPU dense gradients go to ``torch.optim.Adam``.

    Args:
        params: tensors, or dicts of parameter groups.
        lr: step size, above 0 (each group may have its own).
        betas: decay of the two moments, in [0, 1).
        eps: added to the root of the second moment.

    Raises:
        InputError: a number out of range; from ``step``, a parameter that is not contiguous or of another dtype than
            float32, float64 or bfloat16.

    Source: Kingma and Ba, arXiv 1412.6980, algorithm 1.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        check(is_number(lr) and lr > 0.0, "lr", "a number above 0", lr)
        check(all(is_number(b) and 0.0 <= b < 1.0 for b in betas), "betas", "two numbers in [0, 1)", betas)
        check(is_number(eps) and eps >= 0.0, "eps", "a number, 0 or more", eps)
        super().__init__(params, lr=lr, betas=betas, eps=eps, fused=True)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; see ``torch.optim.Optimizer.step``."""
        # The protocols of gradient scaling and of captured steps, whose numbers stay on the device.
        if hasattr(self, "found_inf") or any(isinstance(group["lr"], torch.Tensor) for group in self.param_groups):
            return super().step(closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        ours, rest = [], False
        for group in self.param_groups:
            for param in group["params"]:
                grad = param.grad
                if grad is None:
                    continue
                if grad.is_sparse or param.device.type == "cpu":
                    self._advance(param, grad, group)
                    ours.append((param, grad))
                else:
                    rest = True
        if rest:
            for param, _ in ours:
                param.grad = None
            super().step()
            for param, grad in ours:
                param.grad = grad
        return loss

    def _advance(self, param: torch.Tensor, grad: torch.Tensor, group: dict[str, Any]) -> None:
        fits = param.dtype in _DTYPES and param.is_contiguous()
        check(fits, "params", "contiguous tensors of float32, float64 or bfloat16", param)
        state = self.state[param]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(param), torch.zeros_like(param)
        index = None
        if grad.is_sparse:
            if param.dim() != 1:
                raise InputError(
                    f"params: expected one dimension where the gradient is sparse, got {tuple(param.shape)}"
                )
            index, grad = _ascending(grad)
        state["step"] += 1
        torch.ops.acgkd_fast.adam_step_(
            param, state["exp_avg"], state["exp_avg_sq"], index, grad.contiguous(), group["lr"], *group["betas"],
            group["eps"], int(state["step"]),
        )  # fmt: skip


def _ascending(grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Places and values of a sparse gradient, places ascending without repetition."""
    index = grad._indices().view(-1)
    # Accumulation forgets that a tensor is coalesced, and looking is far cheaper than sorting.
    if not grad.is_coalesced() and not bool((index[1:] > index[:-1]).all()):
        grad = grad.coalesce()
        index = grad._indices().view(-1)
    return index, grad._values()
